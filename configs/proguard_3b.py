"""ProGuard-3B: the 7B recipe from Qwen2.5-VL-3B-Instruct. That base, and that nothing else differs, is inferred (PAPERS A2).

pgjax train proguard_3b --checkpoint DIR --data.root DIR --reward.embedder DIR
"""

from dataclasses import replace
from pathlib import Path

from pgjax.models.released import RELEASED
from pgjax.recipes import load_recipe

base = load_recipe(str(Path(__file__).with_name("proguard_7b.py")))
recipe = replace(base, name="proguard_3b", model=RELEASED["Qwen2.5-VL-3B"])
