"""Talk to a GGUF in the terminal: python chat.py MODEL.gguf [--preset laptop] [--prompt "one question"].

`/new` begins a new conversation, `/quit` or an empty line at the end of input leaves.
"""

from __future__ import annotations

from model import PRESETS, ChatModel, Preset, parser

from lmdistill.deployment.runner import load_preset, run, talk


def main() -> None:
    """One question with --prompt, else a conversation."""
    arguments = parser(__doc__)
    arguments.add_argument("--prompt", help="ask this one question and leave")
    given = arguments.parse_args()
    talk(ChatModel(given.gguf, load_preset(Preset, PRESETS, given.preset)), given.prompt)


if __name__ == "__main__":
    run(main)
