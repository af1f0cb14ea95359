"""The 7B recipe from Qwen2.5-VL-32B-Instruct. No published run: what of it stays is our choice, and the mesh is for `pgjax plan` to try.

pgjax train proguard_32b --checkpoint DIR --data.root DIR --reward.embedder DIR
"""

from dataclasses import replace
from pathlib import Path

from pgjax.models.released import RELEASED
from pgjax.recipes import load_recipe

base = load_recipe(str(Path(__file__).with_name("proguard_7b.py")))
recipe = replace(base, name="proguard_32b", model=RELEASED["Qwen2.5-VL-32B"])
