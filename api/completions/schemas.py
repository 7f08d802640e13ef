"""Completions on the wire: of conversations, and OpenAI's older ones of raw prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

StopSequence = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenIds = list[Annotated[StrictInt, Field(ge=0)]]


class StreamOptions(BaseModel):
    """What a stream has beside the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    #: Padding against eavesdroppers who can see packet sizes; accepted, none is sent.
    include_obfuscation: bool | None = None


class InlineAdapter(BaseModel):
    """An adapter that answers this request and is stored nowhere."""

    model_config = ConfigDict(extra="forbid")

    #: Our safetensors artifact in base64.
    data: str = Field(min_length=1)


class GenerationCreate(BaseModel):
    """What both kinds of completions ask for. Every other key is kept apart and must be neutral."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    #: With ``adapter``: the base model that it belongs to.
    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: StopSequence | Annotated[list[StopSequence], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    adapter: InlineAdapter | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    """A piece of a message's text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. What OpenAI's answers carry beside the text may come back with it, as long as it is empty."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]


class TextFormat(BaseModel):
    """Any text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]


class JsonSchema(BaseModel):
    """A named schema. The answer is held to it, whether ``strict`` says so or not."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    """JSON of a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatCompletionCreate(GenerationCreate):
    """Body of a chat completion. ``max_tokens`` is deprecated by OpenAI in favour of ``max_completion_tokens``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None


class CompletionCreate(GenerationCreate):
    """Body of a completion: raw prompts, as texts or as token ids."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    best_of: int | None = Field(default=None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)


class Usage(BaseModel):
    """Tokens read and written. A prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    bytes: list[int] | None
    logprob: float


class ContentLogprob(TopLogprob):
    """A token of the answer, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer's tokens."""

    content: list[ContentLogprob] | None
    refusal: None = None


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of ``n`` answers."""

    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """OpenAI's answer in one piece. The choices of a stream's have a ``delta`` in the place of the ``message``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log probabilities of an answer's tokens, in lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    #: Where each token begins in the choice's text, in characters.
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer to one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str


class Completion(BaseModel):
    """OpenAI's older answer. The pieces of a stream look the same, ``finish_reason`` being null in all but the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
