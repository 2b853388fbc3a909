"""Tiny models of Hugging Face architectures, built from config with random weights: how wide dpcompile reaches.

Each entry of `ARCHITECTURES` builds one `zoo.Case` with dropout, drop-path and layer-drop set to 0 by the config's
own fields, and without a key-value cache, of which training makes no use. Those in `REFUSED` have no per-sample
gradient, or choose their way through the code by the data; the texts are what the refusal must say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Generator, Tensor, nn
from zoo import (
    CLASSES,
    POSITIONS,
    SMALL,
    VOCAB,
    Case,
    Inputs,
    class_loss,
    encoder_decoder_ids,
    images,
    labels,
    masked_token_ids,
    token_ids,
    token_labels,
    token_loss,
)

Batch = Callable[[int, Generator], Inputs]

_ENCODER = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 16}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = SMALL | {"image_size": 8, "patch_size": 4}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "num_labels": CLASSES,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
_SPEECH = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_extract_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "conv_dim": (8, 8),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "classifier_proj_size": 8,
    "num_labels": CLASSES,
}
_WAVE = 120  # samples of sound


# Batches and losses ---------------------------------------------------------------------------------------------------


def waves(batch_size: int, generator: Generator) -> Tensor:
    return torch.randn(batch_size, _WAVE, generator=generator)


def padded_waves(batch_size: int, generator: Generator) -> dict[str, Tensor]:
    lengths = torch.randint(_WAVE // 2, _WAVE + 1, (batch_size, 1), generator=generator)
    return {"input_values": waves(batch_size, generator), "attention_mask": (torch.arange(_WAVE) < lengths).long()}


def masked_encoder_decoder_ids(batch_size: int, generator: Generator) -> dict[str, Tensor]:
    inputs = masked_token_ids(batch_size, generator)
    return inputs | {"decoder_input_ids": token_ids(batch_size, generator, POSITIONS - 2)}


def spectra(frames: int, bins: int) -> Batch:
    return lambda batch_size, generator: torch.randn(batch_size, frames, bins, generator=generator)


def spectra_and_ids(bins: int, frames: int, name: str = "input_features") -> Batch:
    return lambda batch_size, generator: {
        name: torch.randn(batch_size, bins, frames, generator=generator),
        "decoder_input_ids": token_ids(batch_size, generator, POSITIONS - 2),
    }


def ids_ending_with(last: int) -> Batch:
    """Token ids of different lengths, each ending with one `last`; behind it zeros that are masked out."""

    def draw(batch_size: int, generator: Generator) -> dict[str, Tensor]:
        lengths = torch.randint(3, POSITIONS + 1, (batch_size, 1), generator=generator)
        place = torch.arange(POSITIONS)
        ids = token_ids(batch_size, generator).masked_fill(place == lengths - 1, last).masked_fill(place >= lengths, 0)
        return {"input_ids": ids, "attention_mask": (place < lengths).long()}

    return draw


def videos(batch_size: int, generator: Generator) -> Tensor:
    return torch.randn(batch_size, 2, 3, 8, 8, generator=generator)


def images_and_ids(batch_size: int, generator: Generator) -> dict[str, Tensor]:
    return {
        "input_ids": token_ids(batch_size, generator),
        "pixel_values": torch.randn(batch_size, 3, 8, 8, generator=generator),
    }


def embedding_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Towers give an embedding; its pooled form is read as if it were scores of classes."""
    return outputs.pooler_output[:, :CLASSES].sub(F.one_hot(targets, CLASSES)).square().sum(1)


def pixel_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Every pixel of an image has the image's own label."""
    logits = outputs.logits
    spread = targets[:, None, None].expand(-1, *logits.shape[2:])
    return F.cross_entropy(logits, spread, reduction="none").mean((1, 2))


def frame_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Every frame of a recording has the recording's own label."""
    logits = outputs.logits
    spread = targets[:, None].expand(-1, logits.shape[1])
    return F.cross_entropy(logits.transpose(1, 2), spread, reduction="none").mean(1)


# The cases ------------------------------------------------------------------------------------------------------------


def _case(
    name: str,
    model: Callable[[Any], nn.Module],
    config: Callable[[], Any],
    batch: Batch,
    targets: Callable[[int, Generator], Tensor],
    loss: Callable[[Any, Tensor], Tensor],
) -> Case:
    """Build with a fixed seed, then move every parameter off the zeros and ones that initialisers leave behind."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        built = model(config()).train()
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Case(name, built, batch, targets, loss)


ARCHITECTURES: dict[str, Callable[[], Case]] = {}


def _add(
    name: str,
    model: str,
    config: str,
    fields: dict[str, Any],
    batch: Batch,
    targets: Callable[[int, Generator], Tensor] = labels,
    loss: Callable[[Any, Tensor], Tensor] = class_loss,
) -> None:
    """One line of the table. Classes are looked up late: transformers imports a model's file when it is asked for."""
    ARCHITECTURES[name] = lambda: _case(
        name, getattr(hf, model), partial(getattr(hf, config), **fields), batch, targets, loss
    )


def _freeze_batch_norm(name: str) -> None:
    """The same architecture with its batch norms in eval mode, as a refusal suggests: `<name>_frozen`."""
    build = ARCHITECTURES[name]

    def frozen() -> Case:
        case = build()
        for module in case.model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return replace(case, name=f"{name}_frozen")

    ARCHITECTURES[f"{name}_frozen"] = frozen


def _causal(name: str, prefix: str, fields: dict[str, Any], *, model: str = "ForCausalLM", config: str = "") -> None:
    """A language model; its targets are the next tokens."""
    _add(name, prefix + model, config or f"{prefix}Config", fields, token_ids, token_labels(POSITIONS), token_loss)


def _classifier(name: str, prefix: str, fields: dict[str, Any], batch: Batch = masked_token_ids) -> None:
    _add(name, f"{prefix}ForSequenceClassification", f"{prefix}Config", fields, batch)


def _image_classifier(name: str, prefix: str, fields: dict[str, Any], size: int = 8) -> None:
    _add(name, f"{prefix}ForImageClassification", f"{prefix}Config", fields, images(size))


def _translator(
    name: str,
    prefix: str,
    fields: dict[str, Any],
    *,
    model: str = "ForConditionalGeneration",
    batch: Batch = encoder_decoder_ids,
) -> None:
    _add(
        name,
        prefix + model,
        f"{prefix}Config",
        fields,
        batch,
        token_labels(POSITIONS - 2),
        token_loss,
    )


# Text decoders
_GPT = {
    "vocab_size": VOCAB,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
_causal("gpt2", "GPT2", _GPT, model="LMHeadModel")
_causal("openai_gpt", "OpenAIGPT", {k: v for k, v in _GPT.items() if k != "use_cache"}, model="LMHeadModel")
_causal("gpt_bigcode", "GPTBigCode", _GPT)
_causal("gptj", "GPTJ", _GPT | {"rotary_dim": 4})
_causal(
    "gpt_neo",
    "GPTNeo",
    {
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "intermediate_size": 24,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cache": False,
    },
)
_causal("gpt_neox", "GPTNeoX", _DECODER | {"hidden_dropout": 0.0, "attention_dropout": 0.0})
_causal(
    "opt",
    "OPT",
    _DECODER | {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
)
_causal("llama", "Llama", _DECODER)
_causal("mistral", "Mistral", _DECODER | {"sliding_window": 4})
_causal("qwen2", "Qwen2", _DECODER)
_causal("qwen3", "Qwen3", _DECODER | {"head_dim": 8})
_causal("gemma", "Gemma", _DECODER | {"head_dim": 8})
_causal("gemma2", "Gemma2", _DECODER | {"head_dim": 8, "sliding_window": 4})
_causal("gemma3", "Gemma3", _DECODER | {"head_dim": 8, "sliding_window": 4}, config="Gemma3TextConfig")
_causal("phi", "Phi", _DECODER | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0})
_causal("phi3", "Phi3", _DECODER | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0})
_causal("falcon", "Falcon", _DECODER | {"hidden_dropout": 0.0, "attention_dropout": 0.0})
_causal("falcon_alibi", "Falcon", _DECODER | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "alibi": True})
_causal(
    "bloom",
    "Bloom",
    {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cache": False,
    },
)
_causal(
    "mpt",
    "Mpt",
    {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "use_cache": False},
)
_causal("olmo2", "Olmo2", _DECODER)
_causal("stablelm", "StableLm", _DECODER)
_causal("starcoder2", "Starcoder2", _DECODER | {"residual_dropout": 0.0, "embedding_dropout": 0.0})
_causal("cohere", "Cohere", _DECODER)
_causal("glm", "Glm", _DECODER | {"head_dim": 4})
_causal("biogpt", "BioGpt", _ENCODER | {"layerdrop": 0.0, "use_cache": False})
_causal(
    "deepseek_v3",
    "DeepseekV3",
    _DECODER
    | {
        "experts_implementation": "batched_mm",
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "num_key_value_heads": 4,
    },
)

# Text encoders
_classifier("bert", "Bert", _ENCODER)
_classifier("roberta", "Roberta", _ENCODER)
_classifier("albert", "Albert", _ENCODER | {"embedding_size": 8, "classifier_dropout_prob": 0.0})
_classifier(
    "distilbert",
    "DistilBert",
    {
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
        "num_labels": CLASSES,
    },
)
_classifier("electra", "Electra", _ENCODER | {"embedding_size": 8})
_classifier(
    "deberta",
    "Deberta",
    _ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": 0.0},
)
_classifier(
    "deberta_v2",
    "DebertaV2",
    _ENCODER
    | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "pooler_dropout": 0.0,
    },
)
_classifier("mpnet", "MPNet", _ENCODER)
_classifier(
    "modernbert",
    "ModernBert",
    {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "local_attention": 4,
        "pad_token_id": 0,
        "num_labels": CLASSES,
    },
)
_classifier("convbert", "ConvBert", _ENCODER | {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1})
_classifier("squeezebert", "SqueezeBert", _ENCODER | {"embedding_size": 16})
_classifier("roformer", "RoFormer", _ENCODER)
_classifier(
    "nystromformer", "Nystromformer", _ENCODER | {"num_landmarks": 7, "segment_means_seq_len": 7, "conv_kernel_size": 3}
)
_classifier(
    "fnet",
    "FNet",
    SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 16},
    batch=lambda b, g: {"input_ids": token_ids(b, g)},
)
_classifier(
    "mobilebert", "MobileBert", _ENCODER | {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8}
)
_classifier("esm", "Esm", _ENCODER | {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"})
_classifier(
    "xlnet",
    "XLNet",
    {
        "vocab_size": VOCAB,
        "d_model": 16,
        "n_layer": 2,
        "n_head": 2,
        "d_inner": 24,
        "dropout": 0.0,
        "summary_last_dropout": 0.0,
        "num_labels": CLASSES,
        "use_mems_eval": False,
        "use_mems_train": False,
    },
)
_classifier(
    "xlm",
    "XLM",
    {
        "vocab_size": VOCAB,
        "emb_dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "max_position_embeddings": 16,
        "num_labels": CLASSES,
        "summary_first_dropout": 0.0,
    },
)
_classifier(
    "funnel",
    "Funnel",
    {
        "vocab_size": VOCAB,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 24,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "num_labels": CLASSES,
        "truncate_seq": False,
    },
)
_classifier("longformer", "Longformer", _ENCODER | {"attention_window": 4, "pad_token_id": 0})
_classifier("big_bird", "BigBird", _ENCODER | {"attention_type": "original_full"})
_classifier("llama_classifier", "Llama", _DECODER | {"num_labels": CLASSES})
_classifier("gpt2_classifier", "GPT2", _GPT | {"num_labels": CLASSES, "pad_token_id": 0})

# Vision
_image_classifier("vit", "ViT", _VISION)
_image_classifier("deit", "DeiT", _VISION)
_image_classifier(
    "beit",
    "Beit",
    _VISION
    | {
        "vocab_size": VOCAB,
        "use_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.5,
        "drop_path_rate": 0.0,
    },
)
_image_classifier(
    "data2vec_vision",
    "Data2VecVision",
    _VISION | {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0},
)
_image_classifier("dinov2", "Dinov2", _VISION | {"layerscale_value": 0.5, "drop_path_rate": 0.0})
_SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "num_labels": CLASSES,
}
_image_classifier("swin", "Swin", _SWIN, 16)
_image_classifier("swinv2", "Swinv2", _SWIN, 16)
_LEVELS = {"depths": [1, 1], "hidden_sizes": [8, 16], "drop_path_rate": 0.0, "num_labels": CLASSES}
_STAGES = _LEVELS | {"num_stages": 2, "image_size": 16}
_image_classifier("convnext", "ConvNext", _STAGES, 16)
_image_classifier("convnextv2", "ConvNextV2", _STAGES, 16)
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_HEADS = {"num_encoder_blocks": 2, "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
_PYRAMID = _LEVELS | _HEADS | {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2]}
_image_classifier("segformer", "Segformer", _PYRAMID | _NO_DROPOUT | {"classifier_dropout_prob": 0.0}, 16)
_REDUCED = {"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2]}
_image_classifier("pvt", "Pvt", _LEVELS | _HEADS | _REDUCED | _NO_DROPOUT | {"image_size": 16}, 16)
_image_classifier("pvt_v2", "PvtV2", _PYRAMID | {"image_size": 16}, 16)
_POOLS = {"num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "mlp_ratio": 2.0}
_image_classifier("poolformer", "PoolFormer", _LEVELS | _POOLS, 16)
_FOCAL = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "focal_levels": [2, 2], "focal_windows": [3, 3]}
_image_classifier("focalnet", "FocalNet", _LEVELS | _FOCAL, 16)
_image_classifier("bit", "Bit", _LEVELS | {"embedding_size": 8, "num_groups": 2}, 16)
_image_classifier(
    "hiera",
    "Hiera",
    {
        "image_size": [16, 16],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
        "query_stride": [2, 2],
        "num_query_pool": 1,
        "drop_path_rate": 0.0,
        "num_labels": CLASSES,
    },
    16,
)
_image_classifier(
    "mobilevit",
    "MobileViT",
    {
        "image_size": 32,
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8],
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": 0.0,
        "num_labels": CLASSES,
    },
    32,
)
_image_classifier(
    "resnet", "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}, 16
)
_image_classifier(
    "levit",
    "Levit",
    {
        "image_size": 32,
        "hidden_sizes": [16, 16],
        "num_attention_heads": [2, 2],
        "depths": [1, 1],
        "key_dim": [8, 8],
        "drop_path_rate": 0,
        "attention_ratio": [2, 2],
        "mlp_ratio": [2, 2],
        "num_labels": CLASSES,
        "down_ops": [["Subsample", 8, 2, 4, 2, 2]],
    },
    32,
)
_add(
    "segformer_pixels",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    _PYRAMID | {"decoder_hidden_size": 8, "classifier_dropout_prob": 0.0},
    images(16),
    labels,
    pixel_loss,
)
for _name in ("resnet", "mobilevit", "segformer_pixels"):
    _freeze_batch_norm(_name)
_add(
    "videomae",
    "VideoMAEForVideoClassification",
    "VideoMAEConfig",
    _VISION | {"num_frames": 2, "tubelet_size": 2},
    videos,
)
_add(
    "timesformer",
    "TimesformerForVideoClassification",
    "TimesformerConfig",
    _VISION | {"num_frames": 2, "drop_path_rate": 0},
    videos,
)
_add(
    "vivit",
    "VivitForVideoClassification",
    "VivitConfig",
    SMALL | {"image_size": 8, "num_frames": 2, "tubelet_size": [2, 4, 4]},
    videos,
)

# Speech
_classifier("wav2vec2", "Wav2Vec2", _SPEECH, waves)
_add("wav2vec2_frames", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, padded_waves, labels, frame_loss)
_classifier("hubert", "Hubert", _SPEECH, waves)
_classifier("wavlm", "WavLM", _SPEECH, waves)
_classifier(
    "data2vec_audio", "Data2VecAudio", _SPEECH | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}, waves
)
_classifier("sew", "SEW", _SPEECH | {"squeeze_factor": 2}, waves)
_WHISPER = {k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": 6,
    "max_source_positions": 8,
    "max_target_positions": 8,
}
_add(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    _WHISPER,
    spectra_and_ids(6, 16),
    token_labels(POSITIONS - 2),
    token_loss,
)
_add(
    "ast",
    "ASTForAudioClassification",
    "ASTConfig",
    SMALL | {"patch_size": 4, "frequency_stride": 2, "time_stride": 2, "max_length": 10, "num_mel_bins": 8},
    spectra(10, 8),
)
_add(
    "speech_to_text",
    "Speech2TextForConditionalGeneration",
    "Speech2TextConfig",
    _SEQ2SEQ
    | {
        "num_conv_layers": 1,
        "conv_kernel_sizes": (3,),
        "conv_channels": 8,
        "input_feat_per_channel": 6,
        "max_source_positions": 16,
        "max_target_positions": 16,
    },
    lambda b, g: {
        "input_features": torch.randn(b, 12, 6, generator=g),
        "decoder_input_ids": token_ids(b, g, POSITIONS - 2),
    },
    token_labels(POSITIONS - 2),
    token_loss,
)

# State spaces and recurrences
_SSM = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "state_size": 4,
    "num_hidden_layers": 2,
    "conv_kernel": 2,
    "expand": 2,
    "use_cache": False,
}
_causal("mamba", "Mamba", _SSM | {"time_step_rank": 2})
_causal("mamba2", "Mamba2", _SSM | {"num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4})
_causal(
    "rwkv",
    "Rwkv",
    {
        "vocab_size": VOCAB,
        "context_length": 16,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "attention_hidden_size": 8,
        "intermediate_size": 16,
        "use_cache": False,
    },
)
_causal(
    "recurrent_gemma",
    "RecurrentGemma",
    _DECODER | {"lru_width": 16, "attention_window_size": 4, "num_hidden_layers": 3},
)
_causal(
    "xlstm",
    "xLSTM",
    {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "chunk_size": 8,
        "use_cache": False,
    },
)

# Encoder and decoder
_translator("t5", "T5", _T5)
_translator("umt5", "UMT5", _T5)
_translator(
    "longt5", "LongT5", _T5 | {"local_radius": 3, "encoder_attention_type": "local"}, batch=masked_encoder_decoder_ids
)
_translator("bart", "Bart", _SEQ2SEQ)
_translator("mbart", "MBart", _SEQ2SEQ)
_translator("pegasus", "Pegasus", _SEQ2SEQ)
_translator("marian", "Marian", _SEQ2SEQ, model="MTModel")
_translator("blenderbot", "Blenderbot", _SEQ2SEQ)
_translator("m2m_100", "M2M100", _SEQ2SEQ)
_translator(
    "led",
    "LED",
    _SEQ2SEQ | {"max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 16, "attention_window": 4},
)
_translator(
    "prophetnet",
    "ProphetNet",
    {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_encoder_attention_heads": 2,
        "num_decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "max_position_embeddings": 16,
        "use_cache": False,
        "ngram": 2,
        "num_buckets": 4,
        "relative_max_distance": 8,
    },
)
_classifier("bart_classifier", "Bart", _SEQ2SEQ, ids_ending_with(2))
_classifier(
    "t5_classifier",
    "T5",
    _T5 | {"num_labels": CLASSES, "classifier_dropout": 0.0, "eos_token_id": 1},
    ids_ending_with(1),
)

# Mixtures of experts
_MOE = _DECODER | {
    "experts_implementation": "batched_mm",
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
_causal("mixtral", "Mixtral", _MOE)
_causal("qwen2_moe", "Qwen2Moe", _MOE | {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1})
_causal("qwen3_moe", "Qwen3Moe", _MOE | {"head_dim": 8})
_causal("olmoe", "Olmoe", _MOE)
_causal("gpt_oss", "GptOss", _MOE | {"head_dim": 8, "sliding_window": 4})
_translator(
    "switch",
    "SwitchTransformers",
    _T5
    | {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 2,
        "expert_capacity": 8,
        "router_jitter_noise": 0.0,
    },
    batch=masked_encoder_decoder_ids,
)

# Text and images
_CLIP_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "projection_size": 16,
}
_CLIP_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "attention_dropout": 0.0,
}
_add("clip_text", "CLIPTextModel", "CLIPTextConfig", _CLIP_TEXT, masked_token_ids, labels, embedding_loss)
_add("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", _CLIP_VISION, images(8), labels, embedding_loss)
_add(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 8},
    images_and_ids,
    labels,
    lambda o, t: o.logits_per_image.sum(1),
)
_add("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", _CLIP_VISION, images(8), labels, embedding_loss)
_add("siglip_text", "SiglipTextModel", "SiglipTextConfig", _CLIP_TEXT, masked_token_ids, labels, embedding_loss)
_add("blip_vision", "BlipVisionModel", "BlipVisionConfig", _CLIP_VISION, images(8), labels, embedding_loss)
_add(
    "vilt",
    "ViltForQuestionAnswering",
    "ViltConfig",
    _VISION | {"vocab_size": VOCAB, "max_position_embeddings": 16, "num_labels": CLASSES},
    images_and_ids,
)


# What is refused: the configs as their authors train them, with a batch statistic, a loss over the batch, or a way
# through the code that depends on data. Where another config has none of it, that one is above.
_causal("mixtral_grouped", "Mixtral", _MOE | {"experts_implementation": "grouped_mm"})
_causal("mixtral_eager", "Mixtral", _MOE | {"experts_implementation": "eager"})
_causal("mixtral_balanced", "Mixtral", _MOE | {"output_router_logits": True})
_translator("bart_layerdrop", "Bart", _SEQ2SEQ | {"decoder_layerdrop": 0.1})
_classifier("wav2vec2_layerdrop", "Wav2Vec2", _SPEECH | {"layerdrop": 0.1}, waves)
_classifier(
    "wav2vec2_masked",
    "Wav2Vec2",
    _SPEECH | {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2},
    padded_waves,
)

_BATCH_NORM = (
    "BatchNorm2d): batch_norm in training mode takes its statistics over the samples",
    "Replace BatchNorm by nn.GroupNorm, or put it in eval mode",
)
_GLOBAL = ("chooses its way by the data", "if is_global_attn:", "torch.where")

REFUSED: dict[str, tuple[str, ...]] = {
    "resnet": _BATCH_NORM,
    "mobilevit": _BATCH_NORM,
    "levit": ("batch_norm in training mode takes its statistics over the samples", "Replace BatchNorm by nn.GroupNorm"),
    "segformer_pixels": ("`decode_head.batch_norm`", *_BATCH_NORM),
    "timesformer": ("slice picks some samples of the batch by their position", "embeddings[:batch_size, 0, :]"),
    "prophetnet": (
        "gather lets a sample read or write other samples' rows",  # the index is folded in another order
        "self.get_predict_relative_pos_embeddings(",
    ),
    "longformer": _GLOBAL,
    "led": _GLOBAL,
    "vilt": ("chooses its way by the data", "nn.functional.interpolate("),
    "clip": ("matmul multiplies every sample with every other sample", "torch.matmul(text_embeds, image_embeds.t()"),
    "mixtral_grouped": ("sort goes over the samples of the batch", "set_experts_implementation('batched_mm')"),
    "mixtral_eager": ("chooses its way by the data", "for expert_idx in expert_hit:"),
    "mixtral_balanced": ("histc counts over the data of all samples", "balances the load of experts over the batch"),
    "switch": (
        "converts a module's parameters",
        "self.classifier = self.classifier.to(self.dtype)",
        "before compiling",
    ),
    "bart_layerdrop": ("dropout_probability < self.layerdrop", "Set config.decoder_layerdrop=0 (it is 0.1)"),
    "wav2vec2_layerdrop": ("if not skip_the_layer or synced_gpus:", "Set config.layerdrop=0 (it is 0.1)"),
    "wav2vec2_masked": ("num_masked_span = int(mask_prob", "Set config.mask_time_prob=0 (it is 0.5)"),
}
