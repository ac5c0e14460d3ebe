"""Talk to a `.pte` in the terminal: python chat.py MODEL.pte [--preset laptop] [--prompt "one question"].

`/new` begins a new conversation, `/quit` or an empty line at the end of input leaves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model import PRESETS, ChatModel, Preset

from lmdistill.deployment.runner import load_preset, run, talk


def main() -> None:
    """One question with --prompt, else a conversation."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("pte", type=Path, help="the program, such as runs/lfm_executorch/…/out/files-8DA4W_ALL.pte")
    arguments.add_argument("--tokenizer", type=Path, help="its tokenizer; the folder `tokenizer` beside the program")
    arguments.add_argument("--preset", default="laptop", help="a file in presets/ by name, or the path of a .yaml file")
    arguments.add_argument("--max-tokens", type=int, help="longest answer, instead of the preset's")
    arguments.add_argument("--prompt", help="ask this one question and leave")
    given = arguments.parse_args()
    changes = {} if given.max_tokens is None else {"max_tokens": given.max_tokens}
    preset = load_preset(Preset, PRESETS, given.preset, changes)
    talk(ChatModel(given.pte, given.tokenizer, preset), given.prompt)


if __name__ == "__main__":
    run(main)
