"""pgjax: a proactive vision-language safety guard, trained by sharded GRPO in JAX."""

__version__ = "0.1.0"
