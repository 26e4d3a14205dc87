"""Every entry that diffusers and transformers write into the JSON files of a folder, and what becomes of it.

A table has a row for each argument of the constructors that its file is for (a test compares them, by name and by
default, with the versions that are installed); the rows of EARLIER and ALWAYS are written by other versions, or next to
the arguments.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Entry(NamedTuple):
    """What becomes of one entry.

    usual: its value where the file does not name it. kind: "honoured"; "harmless", and `why`; "refused" unless it has
    the usual value or one of `others`; "noted", told in the report unless it has.
    """

    usual: Any
    kind: Literal["honoured", "harmless", "refused", "noted"]
    why: str = ""
    others: tuple[Any, ...] = ()


Table = dict[str, Entry]


def _honoured(usual: Any) -> Entry:
    return Entry(usual, "honoured")


def _harmless(usual: Any, why: str) -> Entry:
    return Entry(usual, "harmless", why)


def _refused(usual: Any, why: str, *others: Any) -> Entry:
    return Entry(usual, "refused", why, others)


def _noted(usual: Any, why: str, *others: Any) -> Entry:
    return Entry(usual, "noted", why, others)


TRAINING = "of training in the reference"
OTHER_BLOCKS = "read by kinds of blocks alone that are refused"
SAMPLING = "of the reference's sampler; the sampler and its noise levels are chosen here"
FLOW = "read under use_flow_sigmas alone, which is refused"
CLASSES = "class embeddings are not supported"
ADDED = "added embeddings (as Stable Diffusion XL's) are not supported"
FILES = "of files and loading"
FLAX = "how diffusers' Flax code computed the same attention"
TOKENS = "the tokenizer says which ids begin, end and fill a prompt"
PIPELINES = "the reference's pipelines for Stable Diffusion do not read it, and nor does sdjax"

ALWAYS: Table = {
    "_class_name": _harmless(None, "looked at on its own"),
    "_diffusers_version": _harmless(None, "looked at on its own"),
    "_name_or_path": _harmless(None, FILES),
}

UNET: Table = {
    "sample_size": _honoured(None),
    "in_channels": _honoured(4),
    "out_channels": _honoured(4),
    "center_input_sample": _honoured(False),
    "flip_sin_to_cos": _honoured(True),
    "freq_shift": _honoured(0),
    "down_block_types": _honoured(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)),
    "mid_block_type": _honoured("UNetMidBlock2DCrossAttn"),
    "up_block_types": _honoured(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
    "only_cross_attention": _honoured(False),
    "block_out_channels": _honoured((320, 640, 1280, 1280)),
    "layers_per_block": _honoured(2),
    "downsample_padding": _honoured(1),
    "mid_block_scale_factor": _honoured(1),
    "dropout": _harmless(0.0, TRAINING),
    "act_fn": _honoured("silu"),
    "norm_num_groups": _honoured(32),
    "norm_eps": _honoured(1e-5),
    "cross_attention_dim": _honoured(1280),
    "transformer_layers_per_block": _honoured(1),
    "reverse_transformer_layers_per_block": _honoured(None),
    "encoder_hid_dim": _refused(None, "projections of the text are not supported"),
    "encoder_hid_dim_type": _refused(None, "projections of the text are not supported"),
    "attention_head_dim": _honoured(8),  # the number of heads, whatever its name says
    "num_attention_heads": _refused(None, "the reference refuses it, too: attention_head_dim is the number of heads"),
    "dual_cross_attention": _refused(False, "it attends to two texts (Versatile Diffusion)", None),
    "use_linear_projection": _honoured(False),
    "class_embed_type": _refused(None, CLASSES),
    "addition_embed_type": _refused(None, ADDED),
    "addition_time_embed_dim": _harmless(None, "read under addition_embed_type alone, which is refused"),
    "num_class_embeds": _refused(None, CLASSES),
    "upcast_attention": _harmless(False, "scores and softmax are float32 in any case"),
    "resnet_time_scale_shift": _honoured("default"),
    "resnet_skip_time_act": _harmless(False, OTHER_BLOCKS),
    "resnet_out_scale_factor": _harmless(1.0, OTHER_BLOCKS),
    "time_embedding_type": _refused("positional", "random Fourier features are not supported"),
    "time_embedding_dim": _honoured(None),
    "time_embedding_act_fn": _honoured(None),
    "timestep_post_act": _honoured(None),
    "time_cond_proj_dim": _refused(None, "guidance-distilled UNets (LCM) are not supported"),
    "conv_in_kernel": _honoured(3),
    "conv_out_kernel": _honoured(3),
    "projection_class_embeddings_input_dim": _harmless(None, "read under class_embed_type alone, which is refused"),
    "attention_type": _refused("default", "gated attention (GLIGEN) is not supported"),
    "class_embeddings_concat": _refused(False, CLASSES, None),
    "mid_block_only_cross_attention": _harmless(None, OTHER_BLOCKS),
    "cross_attention_norm": _harmless(None, OTHER_BLOCKS),
    "addition_embed_type_num_heads": _harmless(64, "read under addition_embed_type alone, which is refused"),
}
"""unet/config.json: diffusers' UNet2DConditionModel."""

VAE: Table = {
    "in_channels": _honoured(3),
    "out_channels": _honoured(3),
    "down_block_types": _honoured(("DownEncoderBlock2D",)),
    "up_block_types": _honoured(("UpDecoderBlock2D",)),
    "block_out_channels": _honoured((64,)),
    "layers_per_block": _honoured(1),
    "act_fn": _honoured("silu"),
    "latent_channels": _honoured(4),
    "norm_num_groups": _honoured(32),
    "sample_size": _harmless(32, "of decoding in tiles"),
    "scaling_factor": _honoured(0.18215),
    "shift_factor": _noted(None, PIPELINES, 0, 0.0),
    "latents_mean": _noted(None, PIPELINES),
    "latents_std": _noted(None, PIPELINES),
    "force_upcast": _harmless(True, "in float16 the autoencoder stays in float32"),
    "use_quant_conv": _honoured(True),
    "use_post_quant_conv": _honoured(True),
    "mid_block_add_attention": _honoured(True),
}
"""vae/config.json: diffusers' AutoencoderKL."""

TEXT: Table = {
    "vocab_size": _honoured(49408),
    "hidden_size": _honoured(512),
    "intermediate_size": _honoured(2048),
    "projection_dim": _harmless(512, "the projection is no part of the encoder"),
    "num_hidden_layers": _honoured(12),
    "num_attention_heads": _honoured(8),
    "max_position_embeddings": _honoured(77),
    "hidden_act": _honoured("quick_gelu"),
    "layer_norm_eps": _honoured(1e-5),
    "attention_dropout": _harmless(0.0, TRAINING),
    "initializer_range": _harmless(0.02, TRAINING),
    "initializer_factor": _harmless(1.0, TRAINING),
    "pad_token_id": _harmless(1, TOKENS),
    "bos_token_id": _harmless(49406, TOKENS),
    "eos_token_id": _harmless(49407, TOKENS),
    "transformers_version": _harmless(None, FILES),
    "architectures": _harmless(None, "the encoder is the same with and without a projection"),
    "output_hidden_states": _harmless(False, "which outputs are handed out"),
    "return_dict": _harmless(True, "how outputs are handed out"),
    "dtype": _harmless(None, "tensors have their stored dtype, or the one asked for"),
    "chunk_size_feed_forward": _harmless(0, "the same numbers in pieces"),
    "is_encoder_decoder": _refused(False, "this is no CLIP text encoder"),
    "id2label": _harmless(None, "of classifiers"),
    "label2id": _harmless(None, "of classifiers"),
    "problem_type": _harmless(None, "of classifiers"),
}
"""text_encoder/config.json: transformers' CLIPTextConfig."""

TOKENIZER: Table = {
    "vocab": _harmless(None, FILES),
    "merges": _harmless(None, FILES),
    "unk_token": _harmless("<|endoftext|>", "every byte is in the vocabulary"),
    "bos_token": _refused("<|startoftext|>", "CLIP's prompts begin with <|startoftext|>"),
    "eos_token": _refused("<|endoftext|>", "CLIP's prompts end with <|endoftext|>"),
    "pad_token": _honoured("<|endoftext|>"),
}
"""tokenizer/tokenizer_config.json: transformers' CLIPTokenizer."""

SCHEDULER: Table = {
    "num_train_timesteps": _honoured(1000),
    "beta_start": _honoured(0.0001),
    "beta_end": _honoured(0.02),
    "beta_schedule": _honoured("linear"),
    "trained_betas": _honoured(None),
    "prediction_type": _honoured("epsilon"),
    "rescale_betas_zero_snr": _honoured(False),
    "variance_type": _refused(
        None,
        "networks that predict a variance are not supported",
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        None,
    ),
    "timestep_type": _refused("discrete", "continuous timesteps are not supported"),
    "use_flow_sigmas": _refused(False, "flow matching is not supported", None),
    "thresholding": _noted(False, "the reference limits x0 at every step; sdjax does not", None),
    "clip_sample": _harmless(False, "the reference's pipelines for Stable Diffusion switch it off"),
    "clip_sample_range": _harmless(1.0, "read under clip_sample alone"),
    "dynamic_thresholding_ratio": _harmless(0.995, "read under thresholding alone"),
    "sample_max_value": _harmless(1.0, "read under thresholding alone"),
    "flow_shift": _harmless(1.0, FLOW),
    "shift_terminal": _harmless(None, FLOW),
    "time_shift_type": _harmless("exponential", FLOW),
    "use_dynamic_shifting": _harmless(False, FLOW),
    "algorithm_type": _harmless("dpmsolver++", SAMPLING),
    "corrector_order": _harmless(2, SAMPLING),
    "disable_corrector": _harmless([], SAMPLING),
    "euler_at_final": _harmless(False, SAMPLING),
    "final_sigmas_type": _harmless("zero", SAMPLING),
    "interpolation_type": _harmless("linear", SAMPLING),
    "lambda_min_clipped": _harmless(-float("inf"), SAMPLING),
    "lower_order_final": _harmless(True, SAMPLING),
    "noise_sampler_seed": _harmless(None, SAMPLING),
    "original_inference_steps": _harmless(50, SAMPLING),
    "predict_x0": _harmless(True, SAMPLING),
    "predictor_order": _harmless(2, SAMPLING),
    "set_alpha_to_one": _harmless(True, SAMPLING),
    "sigma_max": _harmless(None, SAMPLING),
    "sigma_min": _harmless(None, SAMPLING),
    "skip_prk_steps": _harmless(False, SAMPLING),
    "solver_order": _harmless(2, SAMPLING),
    "solver_p": _harmless(None, SAMPLING),
    "solver_type": _harmless("midpoint", SAMPLING),
    "steps_offset": _harmless(0, SAMPLING),
    "tau_func": _harmless(None, SAMPLING),
    "timestep_scaling": _harmless(10.0, SAMPLING),
    "timestep_spacing": _harmless("leading", SAMPLING),
    "use_beta_sigmas": _harmless(False, SAMPLING),
    "use_exponential_sigmas": _harmless(False, SAMPLING),
    "use_karras_sigmas": _harmless(False, SAMPLING),
    "use_lu_lambdas": _harmless(False, SAMPLING),
}
"""scheduler/scheduler_config.json: all of `SCHEDULERS`."""

KDPM: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
LCM: dict[str, Any] = {**KDPM, "beta_schedule": "scaled_linear"}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {"variance_type": "fixed_small"},
    "DDPMParallelScheduler": {"variance_type": "fixed_small"},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSDEScheduler": KDPM,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": KDPM,
    "KDPM2AncestralDiscreteScheduler": KDPM,
    "KDPM2DiscreteScheduler": KDPM,
    "LCMScheduler": LCM,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": LCM,
    "UniPCMultistepScheduler": {},
}
"""The schedulers of this diffusion process, and the usual values in which they differ from `SCHEDULER`."""

OTHER_TASKS = (
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
    *("forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty"),
    *("max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "sep_token_id"),
    *("return_dict_in_generate", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p"),
    "use_bfloat16",
)
"""What transformers up to 4 writes into the configuration of any network whatever."""

EARLIER: dict[str, Table] = {
    "unet": {
        "split_head_dim": _harmless(False, FLAX),
        "use_memory_efficient_attention": _harmless(False, FLAX),
    },
    "vae": {},
    "text": {
        **{name: _harmless(None, "of generating text and other tasks") for name in OTHER_TASKS},
        "pruned_heads": _refused({}, "all heads are needed", None),
        "dropout": _harmless(0.0, TRAINING),
        "model_type": _refused(
            "clip_text_model", "this is no CLIP text encoder", "clip", "clip_text_model_with_projection"
        ),
        "torch_dtype": _harmless(None, "tensors have their stored dtype, or the one asked for"),
        "output_attentions": _harmless(False, "which outputs are handed out"),
        "use_cache": _harmless(True, "of generating text"),
        "gradient_checkpointing": _harmless(False, TRAINING),
        "text_config": _harmless(None, "taken in place of the whole"),
        "logit_scale_init_value": _harmless(2.6592, TRAINING),
    },
    "tokenizer": {
        "add_prefix_space": _harmless(False, "CLIP's words have no prefix"),
        "added_tokens_decoder": _harmless(None, "looked at on its own"),
        "additional_special_tokens": _harmless(None, FILES),
        "backend": _harmless(None, FILES),
        "clean_up_tokenization_spaces": _harmless(None, "of ids to text"),
        "do_lower_case": _harmless(True, "CLIP's tokenizer lowers case in any case"),
        "errors": _harmless("replace", "of ids to text"),
        "extra_special_tokens": _harmless(None, FILES),
        "is_local": _harmless(None, FILES),
        "local_files_only": _harmless(None, FILES),
        "add_bos_token": _harmless(None, "prompts begin and end with their tokens in any case"),
        "max_length": _harmless(None, "prompts are cut at the length of the text encoder"),
        "model_max_length": _honoured(None),
        "pad_to_multiple_of": _refused(None, "prompts are padded to the length of the text encoder"),
        "pad_token_type_id": _harmless(0, FILES),
        "padding": _harmless(None, "prompts are always padded"),
        "stride": _harmless(0, "prompts are cut, with nothing left over"),
        "truncation": _harmless(None, "prompts are always cut"),
        "truncation_strategy": _harmless(None, "prompts are always cut"),
        "name_or_path": _harmless(None, FILES),
        "padding_side": _refused("right", "prompts are padded on the right"),
        "processor_class": _harmless(None, FILES),
        "special_tokens_map_file": _harmless(None, FILES),
        "split_special_tokens": _refused(False, "special tokens stay whole"),
        "tokenizer_class": _refused("CLIPTokenizer", "this is not CLIP's tokenizer", "CLIPTokenizerFast", None),
        "tokenizer_file": _harmless(None, FILES),
        "truncation_side": _refused("right", "prompts are cut on the right"),
        "use_fast": _harmless(None, FILES),
    },
    "scheduler": {
        "predict_epsilon": _refused(True, "use prediction_type", None),
        "tensor_format": _harmless("pt", FILES),
    },
}
"""What only other versions write, or what is written in addition to the constructors' arguments."""
