"""Public data sets, read where they lie. One reader a set: files in, `Example`s out, what cannot be used counted by reason."""
