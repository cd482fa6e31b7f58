"""Sequential sampling by SGLang's Engine instead of ours, for the stages that do not branch (1 and 2).

SamplingParams ──► sampling_dict ──► sglang.Engine.generate ──► rollout_of ──► Rollout
Megatron weights ──► Hugging Face names ──► flat buckets ──► update_weights_from_tensor, bucket by bucket

SGLang is imported when a backend is made, never before. It decodes in processes of its own on this rank's GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_npr.config import RolloutSettings
from megatron_npr.hf.huggingface import named_tensors
from megatron_npr.repairs.sglang import handles_by_uuid, policy_log_probs
from megatron_npr.rollout.flat_buckets import FlatBucket, flat_buckets
from npr_engine.language.token_ids import TokenIds
from npr_engine.language.vocabulary import Vocabulary
from npr_engine.model.linear import Weight
from npr_engine.model.transformer import ModelConfig
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams
from npr_engine.scheduler.response_state import Request
from npr_ext.errors import UserError

SEEDS = 1 << 31


class SGLangBackend:
    """A Backend over one sglang.Engine."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        settings: RolloutSettings,
        *,
        vocabulary: Vocabulary,
        dtype: str,
        gpu: int,
    ) -> None:
        self._config, self._eos_ids = config, vocabulary.eos_ids
        self._unused_ids = frozenset(vocabulary.unused_ids(config.vocab_size).tolist())
        self._version = 0
        with policy_log_probs():
            self._engine = _sglang().Engine(
                model_path=str(folder),
                skip_tokenizer_init=True,
                dtype=dtype,
                base_gpu_id=gpu,
                max_total_tokens=settings.kv_slots,
                max_running_requests=settings.max_running_requests,
                enable_memory_saver=True,
                enable_deterministic_inference=True,  # else seeds are ignored
                log_level="error",
            )

    def generate(
        self,
        prompts: Sequence[TokenIds],
        sampling: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """A rollout for each prompt, in their order; `on_progress` is called once, at the end."""
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        ids = [str(index) for index in range(len(prompts))] if request_ids is None else list(request_ids)
        requests = [
            Request(name, np.asarray(prompt, np.int32), param)
            for name, prompt, param in zip(ids, prompts, params, strict=True)
        ]
        if not requests:
            return []
        answers = self._engine.generate(
            input_ids=[request.prompt_ids.tolist() for request in requests],
            sampling_params=[sampling_dict(request, self._eos_ids, self._unused_ids) for request in requests],
            return_logprob=True,
        )
        rollouts = [
            rollout_of(request, answer, eos_ids=self._eos_ids, version=self._version)
            for request, answer in zip(requests, answers, strict=True)
        ]
        for rollout in rollouts:
            check_ids(rollout, self._unused_ids)
        if on_progress is not None:
            on_progress(len(rollouts), len(rollouts))
        return rollouts

    def update_weights(self, weights: Mapping[str, Weight], version: int) -> None:
        """Sends full (unsharded) weights in Megatron's names; SGLang drops its cache. An update that breaks off leaves SGLang
        with a mixture of weights: that is a RuntimeError, which ends the run."""
        if version <= self._version:
            raise UserError(f"update_weights: version {version} is not newer than {self._version}")
        full = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        for bucket in flat_buckets(named_tensors(full, self._config)):
            success, message = self._engine.update_weights_from_tensor(
                [_serialised(bucket)], load_format="flattened_bucket"
            )
            if not success:
                names = f"{bucket.tensors[0].name} to {bucket.tensors[-1].name}"
                raise RuntimeError(f"SGLang did not take the weights {names}: {message}")
        self._version = version

    def release_memory(self) -> None:
        self._engine.release_memory_occupation(tags=["kv_cache"])

    def resume_memory(self) -> None:
        self._engine.resume_memory_occupation(tags=["kv_cache"])


def sampling_dict(request: Request, eos_ids: Sequence[int], unused_ids: Iterable[int]) -> dict[str, Any]:
    """SGLang's sampling parameters of a request; UserError for what it cannot do as our engine does.

    It adds `logit_bias` to the logits before it takes log-probs of them: those are normalised over the tokens, as ours are.
    """
    params = request.params
    for name, asked in {
        "branching": params.branching,
        "repetition_penalty": params.repetition_penalty != 1.0,  # SGLang's is not confined to steps
        "max_critical_path": params.max_critical_path is not None,
    }.items():
        if asked:
            raise UserError(
                f"rollout.backend = 'sglang' decodes plain sequences: {name} = {vars(params)[name]} is for 'native'"
            )
    bias = {str(token): -math.inf for token in unused_ids}
    return {
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "ignore_eos": params.ignore_eos,
        "stop_token_ids": [*([] if params.ignore_eos else eos_ids), *params.stop_token_ids],
        "logit_bias": bias or None,
        "sampling_seed": request.key % SEEDS,
    }


def bucket_message(bucket: FlatBucket, metadata: Callable[..., Any]) -> dict[str, Any]:
    """A bucket as SGLang reads it; `metadata` makes one of its FlattenedTensorMetadata, indices and numel in bytes."""
    return {
        "flattened_tensor": bucket.flat,
        "metadata": [
            metadata(
                name=place.name,
                shape=place.shape,
                dtype=place.dtype,
                start_idx=place.begin,
                end_idx=place.end,
                numel=place.end - place.begin,
            )
            for place in bucket.tensors
        ],
    }


def _serialised(bucket: FlatBucket) -> bytes:
    """A message for SGLang's one rank: on a GPU a handle of the bucket's memory, which PyTorch keeps until it is read."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    with handles_by_uuid():  # SGLang may number the GPUs otherwise
        message: bytes = MultiprocessingSerializer.serialize(bucket_message(bucket, FlattenedTensorMetadata))
    return message


def rollout_of(
    request: Request, answer: Mapping[str, Any], *, eos_ids: Sequence[int], version: int
) -> Rollout:
    """SGLang's answer as a Rollout: one trunk, every token sampled.

    Its log-probs are those before temperature and truncation (see `repairs/sglang.py`). What the sampler's were it does not
    say: NaN, unless both distributions are the same. Decode steps are the tokens' numbers.
    """
    pairs = answer["meta_info"]["output_token_logprobs"]
    count, params = len(pairs), request.params
    logprobs = np.array([pair[0] for pair in pairs], np.float32)
    unchanged = (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    return Rollout(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        token_ids=np.array([pair[1] for pair in pairs], np.int32),
        logprobs=logprobs,
        sampler_logprobs=logprobs if unchanged else np.full(count, np.nan, np.float32),
        forced=np.zeros(count, np.bool_),
        branch_ids=np.zeros(count, np.int32),
        decode_steps=np.arange(count, dtype=np.int32),
        positions=len(request.prompt_ids) + np.arange(count, dtype=np.int32),
        finish_reason=_reason(answer["meta_info"]["finish_reason"], eos_ids),
        branching=False,
        constrained=False,
        weights_version=version,
    )


def check_ids(rollout: Rollout, unused_ids: Collection[int]) -> None:
    """RuntimeError where SGLang sampled a row that no token has, although it was told not to."""
    behind = sorted(set(rollout.token_ids.tolist()).intersection(unused_ids))
    if behind:
        raise RuntimeError(
            f"SGLang sampled {behind[0]}, which is no id of the tokenizer, in {rollout.request_id}: it ignores logit_bias"
        )


def _reason(finish: Mapping[str, Any], eos_ids: Sequence[int]) -> str:
    match finish["type"]:
        case "length":
            return "length"
        case "stop":
            return "eos" if finish["matched"] in eos_ids else "stopped"
        case "abort":
            return f"error({finish['message']})"
        case other:
            raise AssertionError(f"SGLang ends with a reason that we do not know: {other!r}")


def _sglang() -> Any:
    """The module, imported here first; UserError where it is not installed."""
    try:
        import sglang
    except ImportError as error:
        raise UserError(
            "rollout.backend = 'sglang' needs SGLang, the extra `sglang` of this project:"
            f" pip install 'megatron-npr[sglang]', or use rollout.backend = 'native' ({error})"
        ) from None
    return sglang
