"""What a request may say. Fields that the engine cannot honour are there with their neutral values alone, so that a
client which sends them is served, and one that means them is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
SHAPES = {
    "prompt": "a text, a list of token ids, or a list of up to 64 of either",
    "stop": "a string of 1 to 256 characters, or up to 4 of them",
}
"""In words, where a field may be of several types."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a request that streams may ask for besides."""

    include_usage: bool = Field(False, description="one more chunk at the end, with usage and no choices")


class GenerationRequest(_Strict):
    """What completions and chat completions have in common."""

    model: str | None = Field(None, description="the served model's name; it where left out")
    max_tokens: int | None = Field(
        None, ge=1, description="over all branches, forced ones included; at most the server's limit"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="1 by default; below 0.001: greedy")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=64, description="choices for each prompt")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = Field(
        None, description="strings that end the response where they occur in the trunk; not part of its text"
    )
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="the same draws again; else random")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken, not used")

    frequency_penalty: Literal[0] | None = Field(None, description="not supported")
    presence_penalty: Literal[0] | None = Field(None, description="not supported: see repetition_penalty")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="not supported"
    )

    top_k: int = Field(0, ge=0, lt=1 << 31, description="extension; 0: all tokens")
    min_p: float = Field(0.0, ge=0, lt=1, description="extension")
    repetition_penalty: float = Field(1.0, ge=0.1, le=10, description="extension: inside steps")
    branching: bool | None = Field(None, description="extension: fork and join at the tags; chat's default")
    max_branches: int = Field(8, ge=1, le=64, description="extension: of a block")
    constrain: bool | None = Field(
        None, description="extension: mask tokens that break the format; with branching the server's default"
    )
    interleave: bool = Field(
        False, description="extension: stream branches as they decode, not one after the other"
    )

    @property
    def limit_field(self) -> str:
        """The field that bounds the response's tokens."""
        return "max_tokens"

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream = true")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: Literal[0] | None = Field(
        None, description="0: the log-probability of each token; those of others are not known"
    )
    echo: Literal[False] | None = Field(None, description="not supported")
    suffix: Literal[""] | None = Field(None, description="not supported")
    best_of: Literal[1] | None = Field(None, description="not supported")


class TextPart(_Strict):
    """A piece of a message's content: text, and nothing else."""

    type: Literal["text"]
    text: str


Nothing: TypeAlias = Annotated[list[Any], Field(max_length=0)] | None


class Message(_Strict):
    """One message of a conversation. OpenAI's client writes all fields of a reply, so that it can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="taken, not used")

    refusal: Literal[""] | None = Field(None, description="not supported")
    audio: None = Field(None, description="not supported")
    function_call: None = Field(None, description="not supported")
    tool_calls: Nothing = Field(None, description="not supported")
    annotations: Nothing = Field(None, description="not supported")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Strict):
    """The one response format."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="the log-probability of each token")
    top_logprobs: Literal[0] | None = Field(None, description="those of other tokens are not known")
    response_format: TextFormat | None = Field(None, description="nothing else is supported")

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit: give one")
        return self
