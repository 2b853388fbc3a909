"""`hf:` targets: a transformers class built from its config on the meta device, and a sample that it accepts."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dpcompile.specs import Spec, TargetError

_SPEECH_SAMPLES = 16_000  # one second


def build_hf(name: str, settings: Sequence[str] = (), *, real: bool = False) -> nn.Module:
    """`transformers.<name>` from its default config with `settings` ("field=value") on top.

    Raises:
        TargetError: there is no such model, or its config has no such field or does not take the value.
    """
    try:
        import transformers
    except ImportError:
        raise TargetError("hf: targets need transformers: pip install 'dpcompile[hf]'") from None
    cls = getattr(transformers, name, None)
    if cls is None:
        raise TargetError(f"transformers has no {name!r}{near(name, dir(transformers))}")
    make_config = getattr(cls, "config_class", None)
    if make_config is None or not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TargetError(f"transformers.{name} is not a model class with a config of its own")
    try:
        fields = dict(_setting(text) for text in settings)
        default = make_config()
        known = {*default.to_dict(), *getattr(make_config, "attribute_map", {})}
        for field in fields:
            if field not in known:
                raise TargetError(f"--set: {make_config.__name__} has no field {field!r}{near(field, known)}")
        if "use_cache" in known:
            fields.setdefault("use_cache", False)  # training has no use for the caches that would be returned
        with torch.device("cpu" if real else "meta"):
            return cls(make_config(**fields))
    except TargetError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise TargetError(f"transformers.{name} cannot be built: {type(error).__name__}: {line}") from error


def sample_specs(model: Any, batch: int, seq: int | None = None) -> list[Spec]:
    """What the model takes, from its `main_input_name` and its config.

    Raises:
        TargetError: its input is of a kind that cannot be told from the config.
    """
    config, main = model.config, model.main_input_name
    if main == "input_ids":
        limit = getattr(config, "max_position_embeddings", None)
        first = Spec(torch.int64, (batch, _positions(seq, limit)), main)
    elif main == "pixel_values":
        first = Spec(torch.float32, (batch, *_image(config)), main)
    elif main == "input_values":
        sound = (
            (config.max_length, config.num_mel_bins) if hasattr(config, "num_mel_bins") else (seq or _SPEECH_SAMPLES,)
        )
        first = Spec(torch.float32, (batch, *sound), main)
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        first = Spec(torch.float32, (batch, config.num_mel_bins, 2 * config.max_source_positions), main)
    else:
        raise TargetError(f"what {type(model).__name__} takes ({main}) cannot be told from its config; give --input")
    if not getattr(config, "is_encoder_decoder", False):
        return [first]
    limit = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    return [first, Spec(torch.int64, (batch, _positions(seq, limit)), "decoder_input_ids")]


def near(name: str, known: Iterable[str]) -> str:
    """The known names that `name` may have meant, as the end of a message."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _positions(seq: int | None, limit: int | None) -> int:
    return min(seq or 128, limit) if isinstance(limit, int) and limit > 0 else seq or 128


def _image(config: Any) -> tuple[int, ...]:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return (*frames, getattr(config, "num_channels", None) or 3, height, width)


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field.isidentifier():
        raise TargetError(f"--set {text!r} is not of the form field=value")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value
