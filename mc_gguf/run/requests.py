"""Checks of what a completion, a chat, a processor or a state brings: llama_cpp ignores much of what it does
not understand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import LlamaError
from mc_gguf.run.arguments import to_seed
from mc_gguf.runtime.llama_library import check_tokens, is_whole, llama_cpp

LlamaGrammar: Any = llama_cpp.LlamaGrammar  # type: ignore[attr-defined]  # llama_cpp has few types
LlamaState: Any = llama_cpp.LlamaState
MAX_REPEATS = 2000  # MAX_REPETITION_THRESHOLD of llama.cpp's grammars
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MAX_DEPTH = 100
_FORMATS = ("text", "json_object")


def check_completion(given: Mapping[str, Any]) -> None:
    """Raises LlamaError for arguments of create_completion that would be ignored, or fail elsewhere."""
    for name in ("max_tokens", "logprobs", "top_logprobs"):
        value = given.get(name)
        if value is not None and not (isinstance(value, bool) and name == "logprobs") and not is_whole(value):
            raise LlamaError(f"{name} must be a whole number, not {value!r}")
    if (stop := given.get("stop")) is not None:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise LlamaError(f"stop must be a text or a list of texts, none of them empty, not {stop!r}")
    grammar = given.get("grammar")
    if grammar is not None and not isinstance(grammar, LlamaGrammar):
        raise LlamaError(f"grammar must be a LlamaGrammar (LlamaGrammar.from_string), not {grammar!r}")
    if bias := given.get("logit_bias"):
        _check_bias(bias)


def _check_bias(bias: Any) -> None:
    is_mapping = isinstance(bias, Mapping)
    if not is_mapping or not all(_is_bias(token, amount) for token, amount in bias.items()):
        raise LlamaError(f"logit_bias must be a dict of finite numbers by token id, not {bias!r}")


def _is_bias(token: Any, amount: Any) -> bool:
    is_id = is_whole(token) or (isinstance(token, str) and token.isdecimal())  # JSON has no other keys
    return is_id and isinstance(amount, int | float) and not math.isnan(amount) and amount != math.inf


def biased(bias: Mapping[Any, Any], n_vocab: int) -> Callable[[Any, NDArray[np.single]], NDArray[np.single]]:
    """A logits processor that adds `bias`, by token id. Raises LlamaError for a token that does not exist."""
    tokens = check_tokens([int(token) for token in bias], n_vocab)
    amounts = np.array([float(amount) for amount in bias.values()], dtype=np.single)

    def add(_ids: Any, scores: NDArray[np.single]) -> NDArray[np.single]:
        scores = scores.copy()
        scores[tokens] += amounts
        return scores

    return add


def check_chat(given: Mapping[str, Any]) -> None:
    """Raises LlamaError for arguments of create_chat_completion that no template can take."""
    messages = given["messages"]
    if not isinstance(messages, list | tuple) or not messages or not all(map(_is_message, messages)):
        raise LlamaError(
            'messages must be a list of dicts, such as {"role": "user", "content": "Hello"}, not '
            f"{_excerpt(messages)}"
        )
    for name in ("tools", "functions"):
        _check_tools(name, given.get(name))
    if given.get("tool_choice") not in (None, "none", "auto") and not given.get("tools"):
        raise LlamaError("tool_choice chooses one of tools, and there are none")
    check_completion(given)
    if (wanted := given.get("response_format")) is not None:
        check_format(wanted)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _check_tools(name: str, tools: Any) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise LlamaError(f"{name} must be a list of dicts, not {_excerpt(tools)}")
    for tool in tools:
        function = tool.get("function") if name == "tools" else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise LlamaError(f"{name}: {_excerpt(tool)} has no function with a name")


def check_format(wanted: Any) -> None:
    """Raises LlamaError for a response_format that llama_cpp would answer with any text or any JSON."""
    if not isinstance(wanted, Mapping) or wanted.get("type") not in _FORMATS:
        raise LlamaError(
            f'response_format must be {{"type": "text"}} or {{"type": "json_object"}}, which may '
            f'have a "schema", not {_excerpt(wanted)}'
        )
    if "schema" in wanted:
        _check_schema(wanted["schema"])
        try:
            LlamaGrammar.from_json_schema(json.dumps(wanted["schema"]), verbose=False)
        except Exception as error:  # llama_cpp raises no other kind
            raise LlamaError(
                f"response_format: this schema cannot be followed: {type(error).__name__}: {error}"[:300]
            ) from error


def _check_schema(schema: Any, depth: int = 0) -> None:
    """Numbers of repetitions are written out, so large ones would take minutes."""
    if depth > _MAX_DEPTH:
        raise LlamaError(f"response_format: the schema is deeper than {_MAX_DEPTH} levels")
    if depth == 0 and not isinstance(schema, Mapping | bool):
        raise LlamaError(f"response_format: a schema is a dict, not {_excerpt(schema)}")
    if isinstance(schema, Mapping):
        if str(schema.get("$ref", "#")).startswith("http"):
            raise LlamaError(f"response_format: {schema['$ref']} is not fetched; put it into the schema")
        for key in _COUNTS:
            _check_count(key, schema.get(key))
        for low, high in zip(_COUNTS[::2], _COUNTS[1::2], strict=True):
            if is_whole(schema.get(low)) and is_whole(schema.get(high)) and schema[low] > schema[high]:
                raise LlamaError(f"response_format: {low} is {schema[low]}, above {high}, {schema[high]}")
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            for count in re.findall(r"\{[\d,\s]*?(\d+)\s*,?\s*\}", pattern):
                _check_count("pattern", int(count[:10]))
    values: Iterable[Any] = ()
    if isinstance(schema, Mapping | list):
        values = schema.values() if isinstance(schema, Mapping) else schema
    for value in values:
        _check_schema(value, depth + 1)


def _check_count(key: str, count: Any) -> None:
    if isinstance(count, int | float) and not 0 <= count <= MAX_REPEATS:
        raise LlamaError(
            f"response_format: {key} asks for {count} repetitions; a grammar can have {MAX_REPEATS}"
        )


def as_scores(found: Any, scores: NDArray[np.single]) -> NDArray[np.single]:
    """What a logits processor returned for `scores`. Raises LlamaError when no token can be drawn from it."""
    try:
        logits = np.asarray(found, dtype=np.single)
    except (TypeError, ValueError) as error:
        raise LlamaError(f"a logits processor returned no numbers ({error})") from error
    if logits.shape != scores.shape:
        raise LlamaError(
            f"a logits processor returned an array of shape {list(logits.shape)}, not {list(scores.shape)}"
        )
    if not np.isfinite(logits.max()):
        raise LlamaError("a logits processor returned NaN or infinity, or -infinity for every token")
    return logits


def check_state(state: Any, llama: Any) -> None:
    """Raises LlamaError unless `state` is what save_state() of a Llama like this one returns."""
    if not isinstance(state, LlamaState):
        raise LlamaError(f"a state is what save_state() returned, not {type(state).__name__}")
    fields = (state.input_ids, state.scores)
    if not all(isinstance(field, np.ndarray) and field.dtype.kind in "if" for field in fields):
        raise LlamaError("this state is damaged: its tokens or logits are no numbers")
    if state.scores.shape[1:] != (llama.n_vocab(),) or state.input_ids.shape != llama.input_ids.shape:
        raise LlamaError("this state is of another model, or of a context of another size")
    is_counted = is_whole(state.n_tokens) and 0 <= state.n_tokens <= len(state.input_ids)
    if not is_counted or state.scores.shape != llama.scores[: state.n_tokens].shape:
        raise LlamaError("this state is damaged: it has not the logits of its tokens")
    data = state.llama_state
    if not data or not isinstance(data, bytes) or state.llama_state_size != len(data):
        raise LlamaError("this state is damaged: its size is not that of its data")
    to_seed(state.seed)


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
