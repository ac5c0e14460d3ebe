"""Makes the student that a recipe asks for: from random, from a checkpoint, or grown from the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdistill.pipeline.stage import StageContext
from lmdistill.students import parameters


def make(ctx: StageContext[Any]) -> dict[str, Any]:
    """Write out/model and out/student.json; the metrics hold the parameter counts."""
    import torch

    from lmdistill.checkpoints import save_model
    from lmdistill.corpus.format import CorpusReader

    if ctx.runtime.threads:
        torch.set_num_threads(ctx.runtime.threads)
    corpus = CorpusReader(ctx.one("corpus").out)
    makers = {"grow": _grown, "random": _random, "checkpoint": _from_checkpoint}
    model, record = makers[ctx.config.init](ctx, corpus)
    save_model(model.float().cpu(), ctx.out / "model", tokenizer_from=corpus.tokenizer_folder)
    if (placement := record.pop("placement", None)) is not None:
        placement.save(ctx.out / "model")
    counts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_by_formula": parameters.count(model.config),
        "layer_types": list(getattr(model.config, "layer_types", None) or []),
    }
    record = {"init": ctx.config.init, **counts, **record}
    (ctx.out / "student.json").write_text(json.dumps(record, indent=1) + "\n")
    return counts


def _random(ctx: StageContext[Any], corpus: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lmdistill.students.shape import random_config

    teacher = AutoConfig.from_pretrained(ctx.need_teacher().path, local_files_only=True, trust_remote_code=False)
    torch.manual_seed(ctx.config.seed)
    return AutoModelForCausalLM.from_config(random_config(ctx.config, teacher)), {}


def _from_checkpoint(ctx: StageContext[Any], corpus: Any) -> tuple[Any, dict[str, Any]]:
    from lmdistill.assets import model_folder
    from lmdistill.checkpoints import load_model, refuse_packed
    from lmdistill.quantization.placement import Placement
    from lmdistill.teachers.token_maps import check_same_tokens, token_map

    reference = model_folder(ctx.config.source, ctx.progress)
    refuse_packed(reference.path, fix="give the checkpoint in full precision that it was made from")
    check_same_tokens(token_map(corpus.tokenizer_folder), token_map(reference.path), "the corpus", "the student")
    record = {"source": ctx.config.source.source, "placement": Placement.load(reference.path)}
    return load_model(reference.path), record


def _grown(ctx: StageContext[Any], corpus: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from lmdistill.checkpoints import load_model
    from lmdistill.students import lfm2
    from lmdistill.students.grow import Growth, grow
    from lmdistill.students.regression import Fit

    config = ctx.config
    device = ctx.runtime.resolve_device()
    teacher = load_model(Path(ctx.need_teacher().path), device=device)
    rows = corpus.split("train").tokens_RT[: config.fit_rows].astype("int64")
    tokens_RT = torch.from_numpy(rows).to(device)
    is_lfm2 = config.architecture == "lfm2"
    source = lfm2.from_llama(teacher, tokens_RT[: config.selection_rows], config.kernel) if is_lfm2 else teacher
    growth = Growth(
        architecture=config.architecture,
        layers=config.layers,
        attention_layers=config.attention_layers if is_lfm2 else config.layers,
        kernel=config.kernel,
        selection_rows=config.selection_rows,
        selection_width=config.selection_width,
        fit=Fit(config.fit_steps, config.fit_batch_rows, config.fit_lr, config.precision, config.seed),
    )
    return grow(source.to(device), tokens_RT, growth, ctx.work, ctx.progress)
