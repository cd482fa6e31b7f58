"""Replies in OpenAI's shapes. Extensions: npr_finish_reason, npr (branch, forced), two more counts in usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from megatron_npr.server.generation import Ending
from megatron_npr.server.text.delta import TextDelta
from npr_engine.language.vocabulary import Vocabulary


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usage(_Reply):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    critical_path_tokens: int = Field(
        description="extension: of the longest choice; what its time is proportional to"
    )
    forced_tokens: int = Field(description="extension: of the completion, written by the engine")


class Npr(_Reply):
    """Where a piece of text stands: 0 is the trunk, i branch i of the block that is open."""

    branch: int
    forced: bool


class CompletionLogprobs(_Reply):
    """The tokens of a completion and their log-probs; null for forced ones."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: None = None
    text_offset: None = None


class CompletionChoice(_Reply):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    npr_finish_reason: str | None = Field(
        description="extension: eos, stopped, length, budget or malformed(...)"
    )


class CompletionChunkChoice(CompletionChoice):
    """A piece of one."""

    npr: Npr


class ChatMessage(_Reply):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatToken(_Reply):
    """A token of it; no log-probability where the engine wrote it."""

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[None] = []


class ChatLogprobs(_Reply):
    """The tokens of a chat reply with their log-probs."""

    content: list[ChatToken]


class ChatChoice(_Reply):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    npr_finish_reason: str


class ChatChunkChoice(_Reply):
    """A piece of one."""

    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    npr_finish_reason: str | None
    npr: Npr


class _Head(_Reply):
    id: str
    created: int
    model: str


class Completion(_Head):
    """Answer of /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Head):
    """An event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ChatCompletion(_Head):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Head):
    """An event of its stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(_Reply):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["npr"] = "npr"
    max_model_len: int


class ModelList(_Reply):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Writer(Protocol):
    """Writes the replies of one request."""

    def opening(self, index: int) -> BaseModel | None:
        """The first event of a choice, if it has one of its own."""

    def piece(self, index: int, delta: TextDelta) -> BaseModel:
        """Text of a choice."""

    def ending(self, index: int, ending: Ending) -> BaseModel:
        """The last event of a choice."""

    def usage(self, usage: Usage) -> BaseModel:
        """The last event of a stream that was asked for it."""

    def whole(self, choices: Sequence[tuple[list[TextDelta], Ending]], usage: Usage) -> BaseModel:
        """All in one."""


class CompletionWriter:
    """A Writer for /v1/completions."""

    def __init__(
        self, name: str, created: int, model: str, vocabulary: Vocabulary, *, logprobs: bool
    ) -> None:
        self._head = {"id": name, "created": created, "model": model}
        self._vocabulary = vocabulary
        self._wants_logprobs = logprobs

    def opening(self, index: int) -> BaseModel | None:
        return None

    def piece(self, index: int, delta: TextDelta) -> BaseModel:
        return self._chunk(
            CompletionChunkChoice(
                index=index,
                text=delta.text,
                logprobs=self._logprobs([delta]),
                finish_reason=None,
                npr_finish_reason=None,
                npr=Npr(branch=delta.branch, forced=delta.forced),
            )
        )

    def ending(self, index: int, ending: Ending) -> BaseModel:
        return self._chunk(
            CompletionChunkChoice(
                index=index,
                text="",
                logprobs=None,
                finish_reason=ending.finish_reason,
                npr_finish_reason=ending.reason,
                npr=Npr(branch=0, forced=False),
            )
        )

    def usage(self, usage: Usage) -> BaseModel:
        return CompletionChunk(**self._head, choices=[], usage=usage)

    def whole(self, choices: Sequence[tuple[list[TextDelta], Ending]], usage: Usage) -> BaseModel:
        written = [
            CompletionChoice(
                index=index,
                text="".join(delta.text for delta in deltas),
                logprobs=self._logprobs(deltas),
                finish_reason=ending.finish_reason,
                npr_finish_reason=ending.reason,
            )
            for index, (deltas, ending) in enumerate(choices)
        ]
        return Completion(**self._head, choices=written, usage=usage)

    def _chunk(self, choice: CompletionChunkChoice) -> BaseModel:
        return CompletionChunk(**self._head, choices=[choice])

    def _logprobs(self, deltas: Sequence[TextDelta]) -> CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        tokens = [token for delta in deltas for token in delta.tokens]
        return CompletionLogprobs(
            tokens=[self._vocabulary.text([token.token_id]) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
        )


class ChatWriter:
    """A Writer for /v1/chat/completions."""

    def __init__(
        self, name: str, created: int, model: str, vocabulary: Vocabulary, *, logprobs: bool
    ) -> None:
        self._head = {"id": name, "created": created, "model": model}
        self._vocabulary = vocabulary
        self._wants_logprobs = logprobs

    def opening(self, index: int) -> BaseModel | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, Npr(branch=0, forced=False))

    def piece(self, index: int, delta: TextDelta) -> BaseModel:
        place = Npr(branch=delta.branch, forced=delta.forced)
        return self._chunk(index, {"content": delta.text}, place, logprobs=self._logprobs([delta]))

    def ending(self, index: int, ending: Ending) -> BaseModel:
        return self._chunk(index, {}, Npr(branch=0, forced=False), ending=ending)

    def usage(self, usage: Usage) -> BaseModel:
        return ChatChunk(**self._head, choices=[], usage=usage)

    def whole(self, choices: Sequence[tuple[list[TextDelta], Ending]], usage: Usage) -> BaseModel:
        written = [
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(delta.text for delta in deltas)),
                logprobs=self._logprobs(deltas),
                finish_reason=ending.finish_reason,
                npr_finish_reason=ending.reason,
            )
            for index, (deltas, ending) in enumerate(choices)
        ]
        return ChatCompletion(**self._head, choices=written, usage=usage)

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        place: Npr,
        *,
        logprobs: ChatLogprobs | None = None,
        ending: Ending | None = None,
    ) -> BaseModel:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=None if ending is None else ending.finish_reason,
            npr_finish_reason=None if ending is None else ending.reason,
            npr=place,
        )
        return ChatChunk(**self._head, choices=[choice])

    def _logprobs(self, deltas: Sequence[TextDelta]) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        return ChatLogprobs(
            content=[
                ChatToken(
                    token=self._vocabulary.text([token.token_id]),
                    logprob=token.logprob,
                    bytes=list(self._piece(token.token_id)),
                )
                for delta in deltas
                for token in delta.tokens
            ]
        )

    def _piece(self, token: int) -> bytes:
        pieces = self._vocabulary.pieces
        return pieces[token] if token < len(pieces) else b""


def usage_of(num_prompt_tokens: int, endings: Sequence[Ending]) -> Usage:
    """The tokens of all choices; the critical path of the longest."""
    completion = sum(ending.counts.tokens for ending in endings)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=completion,
        total_tokens=num_prompt_tokens + completion,
        critical_path_tokens=max((ending.counts.critical_path for ending in endings), default=0),
        forced_tokens=sum(ending.counts.forced for ending in endings),
    )
