"""Talk to a GGUF in the terminal: python chat.py MODEL.gguf [--preset laptop] [--prompt "one question"].

`/new` begins a new conversation, `/quit` or an empty line at the end of input leaves.
"""

from __future__ import annotations

from model import ChatModel, Message, load_preset, parser, run

from lmdistill.errors import LmdistillError


def answer(model: ChatModel, messages: list[Message]) -> str:
    """Print an answer as it comes and return it."""
    pieces = []
    for piece in model.stream(messages):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def converse(model: ChatModel) -> None:
    """Read questions until the input ends."""
    messages: list[Message] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question == "/new":
            messages = []
        elif question:
            try:
                asked = [*messages, {"role": "user", "content": question}]
                messages = [*asked, {"role": "assistant", "content": answer(model, asked)}]
            except LmdistillError as error:  # the conversation is as it was
                print(f"{error.render()}\n  or:  /new")


def main() -> None:
    """One question with --prompt, else a conversation."""
    arguments = parser(__doc__)
    arguments.add_argument("--prompt", help="ask this one question and leave")
    given = arguments.parse_args()
    model = ChatModel(given.gguf, load_preset(given.preset))
    if given.prompt is None:
        converse(model)
    else:
        answer(model, [{"role": "user", "content": given.prompt}])


if __name__ == "__main__":
    run(main)
