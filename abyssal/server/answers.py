"""What each route answers, for /openapi.json and /docs.

The models are closed: a field that is sent and not described is a bug, which tests/server/test_openapi.py finds.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


# errors


class OpenAIErrorDetail(_Answer):
    """What went wrong; `param` is the path of the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(_Answer):
    """An error as OpenAI shows it."""

    error: OpenAIErrorDetail


class AnthropicErrorDetail(_Answer):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(_Answer):
    """An error as Anthropic shows it."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


# chat


class TokenLogprob(_Answer):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that came, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    """Log-probabilities of an answer's tokens, thinking included."""

    content: list[ChosenLogprob]
    refusal: None


class Function(_Answer):
    """What a call calls; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(_Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(_Answer):
    """An answer; `reasoning_content` is there in thinking mode."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)


Finish = Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class PromptDetails(_Answer):
    """Tokens of the prompt that were reused."""

    cached_tokens: int


class CompletionDetails(_Answer):
    """Tokens of the answers that were thinking."""

    reasoning_tokens: int


class OpenAIUsage(_Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatAnswer(_Answer):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: OpenAIUsage


class FunctionDelta(_Answer):
    """More of what a call calls."""

    name: str = ""
    arguments: str


class ToolCallDelta(_Answer):
    """More of a call; the first one has its id and name."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class ChatDelta(_Answer):
    """More of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallDelta] = Field(default_factory=list)


class ChatChunkChoice(_Answer):
    """More of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(_Answer):
    """An event of a stream; the last one before `[DONE]` has the usage, if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None


# text completion


class TextLogprobs(_Answer):
    """Log-probabilities, one entry a token; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Answer):
    """One answer, or more of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class TextAnswer(_Answer):
    """A whole answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: OpenAIUsage


class TextChunk(_Answer):
    """An event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: OpenAIUsage | None = None


# messages and responses


class ThinkingBlock(_Answer):
    """Thinking, signed."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class TextBlock(_Answer):
    """Content."""

    type: Literal["text"]
    text: str
    citations: None


class ToolUseBlock(_Answer):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(_Answer):
    """Tokens of the answer that were thinking."""

    thinking_tokens: int


class AnthropicUsage(_Answer):
    """Tokens; those of the input are what was not cached."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageAnswer(_Answer):
    """A whole answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ThinkingBlock | TextBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class Counted(_Answer):
    """Tokens of a prompt."""

    input_tokens: int


class StreamEvent(BaseModel):
    """An event named by its type; the fields are those of the vendor's client library."""

    model_config = ConfigDict(extra="allow")

    type: str


class ResponseEvent(StreamEvent):
    """An event named by its type and numbered; the fields are those of the vendor's client library."""

    sequence_number: int


class ResponseItem(BaseModel):
    """A reasoning, message or function_call item; the fields are those of the vendor's client library."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponseUsage(_Answer):
    """Tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(_Answer):
    """A whole response; what the request asked for stands in it too."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: bool
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage


# models and tokens


class OpenAIModel(_Answer):
    """A name under which the model answers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    efforts: list[str]


class OpenAIModels(_Answer):
    """All names."""

    object: Literal["list"]
    data: list[OpenAIModel]


class AnthropicModel(_Answer):
    """A name under which the model answers; sent to those who send `anthropic-version`."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int


class AnthropicModels(_Answer):
    """All names; sent to those who send `anthropic-version`."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str
    last_id: str


class Tokens(_Answer):
    """Token ids."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(_Answer):
    """Text of token ids."""

    prompt: str


class TokenizerInfo(_Answer):
    """The tokenizer; there is no template, the server renders."""

    tokenizer_class: str
    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: None
    model_max_length: int


# operation


class TraceSummary(_Answer):
    """One request that is kept."""

    id: str
    created: float
    route: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None
    seconds: float


class TraceList(_Answer):
    """The last requests of the caller, newest first."""

    traces: list[TraceSummary]


class TracePrompt(_Answer):
    """The prompt as the model read it."""

    tokens: int
    cached: int
    reason: str
    ids: list[int]
    texts: list[str]


class TraceRepair(_Answer):
    """What was mended in the answer."""

    name: str
    detail: str


class TraceToken(_Answer):
    """A sampled token: the likeliest in its place as [id, text, logprob], and the blocks that each CSA layer chose."""

    id: int
    text: str
    logprob: float
    kind: Literal["reasoning", "content"]
    top: list[tuple[int, str, float]]
    blocks: list[list[int]]


class TraceAnswer(_Answer):
    """One answer."""

    choice: int
    finish_reason: str | None
    repairs: list[TraceRepair]
    tokens: list[TraceToken]


class TraceWhole(TraceSummary):
    """All that is kept of one request."""

    snapshot: str
    context: int
    thinking: bool
    effort: str | None
    ratio: int
    prompt: TracePrompt
    answers: list[TraceAnswer]
    first_token_s: float | None


class Health(_Answer):
    """The process lives."""

    status: Literal["ok"]
    model: str
    running: int


class Ready(_Answer):
    """Whether requests are taken."""

    ready: bool
