"""A teacher that runs beside its student: last hidden states in the student's step, logits later and by chunks.

Axes: R rows, T tokens in a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmdistill.errors import IntegrityError, LmdistillError
from lmdistill.losses.registry import LiveTeacher
from lmdistill.pipeline.stage import ModelRef
from lmdistill.teachers.engine import EngineOptions
from lmdistill.teachers.planned import WIDTHS, parameters_of
from lmdistill.teachers.token_maps import check_same_tokens, real_vocabulary, token_map
from lmdistill.teachers.transformers_engine import TransformersEngine


class LiveEngine(TransformersEngine):
    """The capture's own engine, asked for hidden states instead of a top K."""

    def open(self, teacher: ModelRef, options: EngineOptions) -> None:
        """Load the model; LmdistillError where its logits are more than its head applied to its hidden states."""
        super().open(teacher, options)
        if not self._plain_head:
            raise LmdistillError(
                f"teacher {teacher.name} scales or caps its logits after its head",
                why="a live teacher's logits are made from its hidden states, a chunk at a time",
                fix="capture it with the teach stage, and train with a loss on the cache",
            )

    @property
    def vocab_size(self) -> int:
        """Tokens that it has logits for."""
        return int(self._weight_VD.shape[0])

    @property
    def model(self) -> Any:
        """The teacher itself."""
        return self._model

    def run(self, tokens_RT: Any, positions_RT: Any) -> Any:
        """Its last hidden states `[R, T, D]`, in the capture's precision whatever surrounds the call."""
        import torch

        with torch.no_grad(), torch.autocast(tokens_RT.device.type, enabled=False):
            return self._hidden(tokens_RT, positions_RT)

    def speak(self, tokens_RT: Any, positions_RT: Any, counted_N: Any) -> LiveTeacher:
        """What it has to say at the flat positions that count."""
        hidden_RTD = self.run(tokens_RT, positions_RT)
        return LiveTeacher(hidden_RTD.flatten(0, 1).index_select(0, counted_N), self._weight_VD, self._bias_V)


def spoken_by(student: Any, vocab_size: int, tokens_RT: Any, positions_RT: Any, counted_N: Any) -> LiveTeacher:
    """What the student's own weights, as they are now, say at the flat positions that count, without gradient.

    In the precision of the student's own products.
    """
    import torch

    with torch.no_grad():
        hidden_RTD = student.model(input_ids=tokens_RT, position_ids=positions_RT, use_cache=False).last_hidden_state
    head_VD = student.lm_head.weight.detach()[:vocab_size]
    hidden_ND = hidden_RTD.flatten(0, 1).index_select(0, counted_N)
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, head_VD = hidden_ND.to(dtype), head_VD.to(dtype)
    return LiveTeacher(hidden_ND, head_VD)


def open_live(teacher: ModelRef, student: Path, precision: str, device: str, isolate: bool) -> LiveEngine:
    """The teacher on `device`; PreflightError where its tokens are not those of the student in the folder `student`."""
    tokens = token_map(teacher.path)
    check_same_tokens(token_map(student), tokens, "the student", "the teacher", fix="train a student of its tokens")
    engine = LiveEngine()
    engine.open(teacher, EngineOptions(1, real_vocabulary(tokens), precision=precision, device=device, isolate=isolate))
    return engine


def check_head(student: Any, teacher: LiveEngine, folder: Path) -> None:
    """Raise IntegrityError where the student in `folder` lacks logits for some of its teacher's tokens."""
    rows, tokens = student.get_output_embeddings().weight.shape[0], teacher.vocab_size
    if rows < tokens:
        raise IntegrityError(
            f"the student {folder} has logits for {rows} ids, its teacher's tokenizer {tokens}",
            fix="make a student with the teacher's vocabulary",
        )


def live_load(folder: Path, shape: dict[str, Any], precision: str, batch_tokens: int, chunk: int) -> tuple[int, int]:
    """(operations a token, bytes of memory) that a live teacher of this config.json adds to training."""
    parameters = parameters_of(folder)
    states = batch_tokens * (8 * shape["hidden_size"] + 3 * shape["intermediate_size"])
    logits = 3 * 4 * chunk * shape["vocab_size"]  # of the teacher and of the student, and the probabilities
    return 2 * parameters, (parameters + states) * WIDTHS[precision] + logits
