"""Whatever Llama is given: it works or raises, and the process lives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from mc_gguf import Llama
from mc_gguf.common.errors import LlamaError
from tests.support.fork_server import ForkServer
from tests.support.routing_session import write_lora

pytestmark = pytest.mark.native

IN_WORDS = ("ok", "LlamaError", "FormatError", "SourceError", "McError")
PROMPT = "'one two three ' * 15"  # 45 tokens
GREEDY = "temperature=0, max_tokens"


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[ForkServer]:
    with ForkServer(tiny_gguf) as started:
        yield started


REFUSED = {  # code: what the error says
    # metadata
    "llm(kv_overrides={'llama.expert_used_count': 16})": "n_expert_used_max <= hparams.n_expert",
    "llm(kv_overrides={'llama.expert_used_count': 0})": "n_expert_used_max > 0",
    "llm(kv_overrides={'llama.expert_used_count': -1})": "n_expert_used_max",
    "llm(kv_overrides={'llama.expert_count': 10**6})": "LLAMA_MAX_EXPERTS",
    "llm(kv_overrides={'llama.block_count': 0})": "n_layer_all > 0",
    "llm(kv_overrides={'llama.attention.head_count': 0})": "blk.0.attn_q.weight",
    "llm(kv_overrides={'llama.attention.layer_norm_rms_epsilon': nan})": "epsilon is nan",
    "llm(kv_overrides={'llama.attention.layer_norm_rms_epsilon': -1.0})": "epsilon is -1",
    "llm(kv_overrides={'general.architecture': 'bert'})": "bert.context_length",
    "llm(kv_overrides={'tokenizer.ggml.model': 'bert'})": "vocabulary",
    "llm(kv_overrides={'tokenizer.ggml.model': 'none'})('x')": "has no tokens for",
    "llm(kv_overrides={'x': [1]})": "kv_overrides",
    "llm(kv_overrides={'x' * 200: 1})": "127 bytes",
    "llm(kv_overrides={'llama.expert_used_count\\0x': 1})": "127 bytes, or has a zero",
    "llm(kv_overrides={'llama.expert_used_count': '1'})": "'llama.expert_used_count', expected",
    "llm(kv_overrides={'llama.rope.freq_base': 500})": "'llama.rope.freq_base', expected",
    "llm(kv_overrides={'llama.rope.freq_base': 1e300})": "no finite float32",
    "llm(kv_overrides=[1])": "kv_overrides must be a dict",
    # sizes
    "llm(n_ctx=10**9)": "takes at least",
    "llm(n_ctx=-1)": "n_ctx",
    "llm(n_ctx='5')": "n_ctx",
    "llm(n_batch=0)": "n_batch",
    "llm(n_ubatch=-3)": "n_ubatch",
    "llm(n_threads=10**6)": "n_threads must be a whole number from 1 to 512",
    "llm(n_threads_batch=-1)": "n_threads_batch",
    "llm(type_k=4)": "type_k must be one of 0 (F32)",
    "llm(type_v=26, flash_attn=True)": "type_v must be one of 0 (F32)",
    "llm(type_v=8)": "requires flash_attn",
    "llm(rope_freq_base=nan)": "rope_freq_base",
    "llm(n_gpu_layer=5)": "no option 'n_gpu_layer'; did you mean 'n_gpu_layers'",
    "llm(embeddings=True)": "did you mean 'embedding'",
    "llm(what=None)": "no option 'what'",
    "llm(rope_freq_base=-5.0)": "rope_freq_base must be above 0",
    "llm(rope_freq_scale=1e300)": "rope_freq_scale must be a finite number",
    "llm(yarn_attn_factor=inf)": "yarn_attn_factor must be a finite number",
    "llm(split_mode=99)": "split_mode",
    "llm(embedding='yes')": "embedding must be True or False",
    "llm(draft_model=5)": "draft_model must be a function",
    "llm(draft_model=Draft(), n_batch=8)": "n_batch must be above the 10 tokens",
    "llm(vocab_only=True)('x')": "vocab_only=True, so it computes nothing",
    "llm(embedding=True, n_ubatch=64, pooling_type=1)": "an n_ubatch as large as n_batch",
    "Llama('')": "model_path must be the path of a GGUF",
    "Llama(None)": "model_path must be the path of a GGUF",
    "Llama('x' * 300)": "File name too long",
    "Llama('a\\0b')": "cannot read",
    "llm(pooling_type=9, embedding=True)": "pooling_type must be a whole number from -1 to 4",
    "llm(seed=-5)": "seed",
    "llm(lora_path='/nonexistent/adapter.gguf')": "/nonexistent/adapter.gguf: no such file",
    "llm(chat_template='{{ .System }}')": "template does not compile",
    # grammars
    "llm()('x', grammar=Grammar('root ::= root \"a\"'))": "left recursion",
    "llm()('x', grammar=Grammar('root ::= foo'))": "Undefined rule identifier 'foo'",
    "llm()('x', grammar=Grammar('x ::= \"a\"'))": "does not contain a 'root' symbol",
    "llm()('x', grammar=Grammar(''))": "0 bytes",
    "llm()('x', grammar=Grammar('root ::= [' ))": "grammar cannot be used",
    "llm()('x', grammar=Grammar('root ::= \"a\"{5,2}'))": "at least 5 and at most 2 times",
    "llm()('x', grammar='root ::= \"a\"')": "grammar must be a LlamaGrammar",
    # schemas
    "llm().create_chat_completion([])": "messages must be a list of dicts",
    "llm().create_chat_completion('hi')": "messages must be a list of dicts",
    "llm().create_chat_completion([{}])": "messages must be a list of dicts",
    "chat(response_format='json')": "response_format must be",
    "chat(response_format={'type': 'xml'})": "response_format must be",
    "schema({'type': 'foo'})": "this schema cannot be followed",
    "schema({'$ref': '#/nonexistent'})": "this schema cannot be followed",
    "schema({'$ref': 'https://example.org/x.json'})": "is not fetched",
    "schema({'type': 'string', 'minLength': 10**9})": "minLength asks for 1000000000 repetitions",
    "schema({'type': 'string', 'pattern': '^a{1000000000}$'})": "pattern asks for 1000000000 repetitions",
    "schema({'type': 'array', 'items': {}, 'minItems': 5, 'maxItems': 2})": "minItems is 5, above maxItems",
    "chat(tools=5)": "tools must be a list of dicts",
    "chat(tool_choice={'type': 'function'})": "there are none",
    # sampling
    "llm()('x', temperature=nan)": "finite number",
    "llm()('x', top_p=inf)": "top_p must be a finite number",
    "llm()('x', mirostat_mode=7)": "mirostat_mode",
    "llm()('x', top_k=2**40)": "top_k",
    "llm()('x', seed=2**40)": "seed",
    "llm()('x', logit_bias={99999: 1.0})": "no token 99999",
    "llm()('x', suffix='y')": "suffix is not supported",
    "llm()('x', stop=('a',))": "stop must be a text or a list of texts",
    "llm()('x', stop=['a', ''])": "none of them empty",
    "llm()('x', max_tokens=1.5)": "max_tokens must be a whole number",
    "llm()('x', logit_bias={5.7: 1})": "logit_bias must be a dict",
    "llm()('x', logit_bias={5: nan})": "logit_bias must be a dict",
    "llm()(b'x')": "give a list of token ids, not bytes",
    "llm()(None)": "give a list of token ids, not NoneType",
    "llm().tokenize('x')": "encode the text as UTF-8",
    "processed(lambda ids, scores: None)": "an array of shape [], not [4096]",
    "processed(lambda ids, scores: scores[:-1])": "an array of shape [4095], not [4096]",
    "processed(lambda ids, scores: scores * nan)": "returned NaN",
    "l = llm()\nl('x', logits_processor=[lambda ids, scores: l.close()])": "cannot close the Llama",
    "l = llm()\nl('x', logits_processor=[lambda ids, scores: l('y')])": "cannot use the context",
    # tokens
    "llm().eval([10**6])": "there is no token 1000000; this model's are 0 to 4095",
    "llm().eval([-1])": "no token -1",
    "llm().eval([2**40])": "no token 1099511627776",
    "llm().eval([1] * 300)": "context of 256 tokens is full",
    "llm().detokenize([10**6])": "no token 1000000",
    "llm().detokenize([2**40])": "no token 1099511627776",
    "llm()([10**7])": "no token",
    "llm()([])": "the prompt is empty",
    "llm().sample()": "nothing has been computed",
    "l = llm(); l.eval([1, 2])\nl.sample(idx=100)": "logits != nullptr",
    # embeddings
    "llm().embed('x')": "embedding=True",
    "llm().create_embedding('x')": "embedding=True",
    "llm(embedding=True).embed([])": "give a text, or a list",
    "llm(embedding=True)('x')": "generates nothing",
    "llm(embedding=True).embed(b'x')": "give a text, or a list",
    "llm(embedding=True).embed('\\ud800')": "not UTF-8",
    "llm(embedding=True, pooling_type=4).embed('x')": "RANK",
    # states
    "llm().load_state(None)": "a state is what save_state() returned",
    "l = llm(); l.eval([1, 2]); s = l.save_state(); s.llama_state = b''; s.llama_state_size = 0\n"
    "l.load_state(s)": "damaged",
    "l = llm(); l.eval([1, 2]); s = l.save_state(); s.llama_state = s.llama_state[:-20]\n"
    "l.load_state(s)": "its size is not that of its data",
    # what others hold of a model that is closed
    "l = llm(); t = l.tokenizer(); l.close()\nt.encode('x')": "closed",
    "l = llm(); c = l._ctx; l.close()\nc.n_ctx()": "closed",
    "l = llm(); m = l._model; l.close()\nm.metadata()": "closed",
    "l = llm(); t = l.tokenizer(); del l\nt.encode('x')": "closed",
    "llm().load_state(llm(n_ctx=512).save_state())": "another model",
    "l = llm(); l.eval([1, 2]); s = l.save_state(); s.n_tokens = 10**9\nl.load_state(s)": "not the logits",
    "l = llm(); l.eval([1, 2]); s = l.save_state(); s.n_tokens = -5\nl.load_state(s)": "not the logits",
    "l = llm(); l.eval([1, 2]); s = l.save_state(); s.llama_state = b'\\xff' * len(s.llama_state)\n"
    "l.load_state(s)": "damaged",
}

WORKS = {  # code: what the result's repr matches
    "llm(kv_overrides={'llama.expert_used_count': 3})('x', max_tokens=3)['usage']": "completion_tokens': 3",
    "llm(kv_overrides={'llama.context_length': 1000}, n_ctx=0)(list(range(3, 1000)), max_tokens=None)"
    "['usage']": "total_tokens': 1024",
    "llm(kv_overrides={'llama.context_length': 0})('x', max_tokens=2)['usage']": "completion_tokens': 2",
    "llm(n_batch=1)('one two', max_tokens=3)['usage']": "completion_tokens': 3",
    "llm(n_batch=10**9)('one two', max_tokens=3)['usage']": "completion_tokens': 3",
    "llm(vocab_only=True).tokenize(b'x')": r"\[1, ",
    f"llm(draft_model=Draft())({PROMPT}, {GREEDY}=30)['usage']": "completion_tokens': 30",
    f"llm(draft_model=Draft(), n_batch=16)({PROMPT}, {GREEDY}=None)['usage']": "tokens': 256",
    "llm(type_v=8, flash_attn=True)('x', max_tokens=2)['usage']": "completion_tokens': 2",
    "llm()('x', grammar=Grammar('root ::= \"yes\" | \"no\"'))['choices'][0]['text']": "'(yes|no)'",
    "deep = Grammar('root ::= ' + '(' * 10**5 + '\"a\"' + ')' * 10**5)\n"
    "llm()('x', grammar=deep)['choices'][0]['text']": "a",
    "llm()('x', max_tokens=3, temperature=0, logit_bias={'5': 1000})['choices'][0]['text']": r"(.+)\1\1",
    "llm()('', max_tokens=3)['usage']": "completion_tokens': 3",
    "llm().eval(np.array([1, 2, 3]))": "None",
    "len(llm(embedding=True).embed(['x'] * 300))": "300",
    "len(llm().tokenize(b'a' * 10**5))": "100001",
    "llm().tokenize(b'\\xff\\xfe\\x80')": r"\[1, ",
    "llm().tokenize(bytearray(b'x'))": r"\[1, ",
    "l = llm(); l.eval(range(3, 9)); t = l.sample(temp=0); s = l.save_state(); l.reset(); l.eval([9, 9])\n"
    "l.load_state(s)\nt == l.sample(temp=0)": "True",
    "l = llm(seed=1); l('x', max_tokens=2, temperature=1.5)\nlen({l.sample(temp=0) for _ in range(9)})": "1",
    "len({llm(seed=0)('x', max_tokens=9, temperature=2)['choices'][0]['text'] for _ in range(3)})": "1",
    "l = llm()\nl('x', logits_processor=[lambda _, s: (l.tokenize(b'y'), s)[1]])['usage']": "tokens",
    "schema({'type': 'string', 'maxLength': 3})['choices'][0]['message']['content']": '"',
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_would_end_the_process_is_an_error(server: ForkServer, code: str) -> None:
    result = server.run(code)
    assert result.kind in ("LlamaError", "FormatError", "SourceError"), result
    assert REFUSED[code] in result.text


@pytest.mark.parametrize("code", WORKS)
def test_what_is_unusual_works(server: ForkServer, code: str) -> None:
    result = server.run(code)
    assert result.kind == "ok", result
    assert re.search(WORKS[code], result.text)


NUMBERS = st.one_of(st.integers(-(2**33), 2**33), st.integers(-3, 40), st.floats(), st.none())
OPTIONS = [
    *(
        "n_ctx",
        "n_batch",
        "n_ubatch",
        "n_threads",
        "n_threads_batch",
        "n_gpu_layers",
        "split_mode",
        "main_gpu",
    ),
    *("pooling_type", "attention_type", "rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
    *("type_k", "type_v", "flash_attn", "logits_all", "last_n_tokens_size", "seed", "swa_full", "op_offload"),
]
SAMPLING = [
    *("max_tokens", "temperature", "top_p", "min_p", "typical_p", "top_k", "frequency_penalty", "seed"),
    *("presence_penalty", "repeat_penalty", "mirostat_mode", "mirostat_tau", "mirostat_eta", "tfs_z"),
]
KEYS = [
    *("expert_used_count", "expert_count", "block_count", "context_length", "embedding_length"),
    *("feed_forward_length", "attention.head_count", "attention.head_count_kv", "rope.dimension_count"),
    *("attention.key_length", "attention.value_length", "rope.freq_base", "expert_gating_func"),
    *("attention.layer_norm_rms_epsilon", "expert_weights_scale", "attention.sliding_window"),
]
ARGUMENT_ERRORS = ("ValueError", "TypeError", "ArgumentError", "OverflowError", "MemoryError")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.dictionaries(st.sampled_from(OPTIONS), NUMBERS, max_size=2),
    sampling=st.dictionaries(st.sampled_from(SAMPLING), NUMBERS, max_size=2),
    metadata=st.dictionaries(st.sampled_from(KEYS), NUMBERS.filter(lambda x: x is not None), max_size=1),
)
def test_no_option_ends_the_process(
    server: ForkServer, options: dict[str, Any], sampling: dict[str, Any], metadata: dict[str, Any]
) -> None:
    overrides = {f"llama.{key}": value for key, value in metadata.items()}
    call = f"('one two', **({{'max_tokens': 2}} | {sampling!r}))"
    code = f"llm(kv_overrides={overrides!r}, **{options!r}){call}"
    assert server.run(code).kind in (*IN_WORDS, *ARGUMENT_ERRORS), code


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grammar=st.text(st.sampled_from("rotx:=\"'[]{}()|*+?.,-^\\\n 0129a#<>"), max_size=60))
def test_no_grammar_ends_the_process(server: ForkServer, grammar: str) -> None:
    code = f"llm()('x', max_tokens=3, grammar=Grammar({'root ::= ' + grammar!r}))"
    assert server.run(code).kind in IN_WORDS, code


@pytest.mark.parametrize("n_expert", [4, 16])
def test_an_adapter_has_a_matrix_for_every_expert(server: ForkServer, tmp_path: Path, n_expert: int) -> None:
    adapter = write_lora(tmp_path / "lora.gguf", 256, 512, n_expert, layers=2)
    result = server.run(f"llm(lora_path={str(adapter)!r})('x', max_tokens=2)")
    assert result.kind == "FormatError"
    assert str(adapter) in result.text
    assert "incorrect shape" in result.text


def members() -> list[str]:
    return [name for name in dir(Llama) if not name.startswith("__") and name not in ("close", "model_path")]


def test_every_method_of_a_closed_llama_says_so(tiny_gguf: Path) -> None:
    llm = Llama(tiny_gguf, n_ctx=256, n_threads=1)
    llm.eval([1, 2, 3])
    stream = llm("one two", max_tokens=5, stream=True)
    next(stream)
    llm.close()
    for name in members():
        with pytest.raises(LlamaError, match="closed"):
            getattr(llm, name)
    with pytest.raises(LlamaError, match="closed"):
        llm("x")
    with pytest.raises(LlamaError, match="closed"):
        llm.routing = "off"
    with pytest.raises(LlamaError, match="closed"):
        next(stream)
    llm.close()
    assert isinstance(llm, Llama)


def test_threads_wait_for_each_other(server: ForkServer) -> None:
    result = server.run(
        "from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "l = llm()\n"
        "ask = lambda _: l('one two', max_tokens=20, temperature=0)['choices'][0]['text']\n"
        "answers = list(Pool(4).map(ask, range(8)))\n"
        "len(set(answers)), len(answers)"
    )
    assert result.text == "(1, 8)"


@pytest.mark.parametrize(
    "method", ["tokenize(b'hello ' * 80)", "routing_stats()", "n_ctx()", "token_eos()", "eval([5])"]
)
def test_a_call_during_close_says_closed(server: ForkServer, method: str) -> None:
    result = server.run(
        "import threading, time\n"
        "l, ends = llm(), []\n"
        "def work():\n"
        "    try:\n"
        f"        while True: l.{method}; l.reset()\n"
        "    except LlamaError as error: ends.append(str(error))\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[thread.start() for thread in threads]; time.sleep(.1); l.close()\n"
        "more = [llm() for _ in range(2)]; [thread.join() for thread in threads]\n"
        "set(ends)"
    )
    assert result.text == "{'this Llama is closed; load the model again'}"


def test_a_fork_without_its_threads_says_so(server: ForkServer) -> None:
    result = server.run(
        "import os\n"
        "from tools.forks import Limits, forked\n"
        "l = llm(n_threads=2, n_threads_batch=2); l('x', max_tokens=1)\n"
        "def child(n_threads):\n"
        "    try:\n"
        "        l = llm(n_threads=n_threads, n_threads_batch=n_threads)\n"
        "        return 'ok', str(l('x', max_tokens=1)['usage'])\n"
        "    except LlamaError as error: return 'LlamaError', str(error)\n"
        "[forked(lambda: child(n), Limits(16 << 30, 60)) for n in (1, 2)]"
    )
    assert result.kind == "ok"
    assert "'completion_tokens': 1" in result.text
    assert "is a fork of one that has computed with several threads" in result.text


def test_a_state_that_cannot_be_loaded_leaves_an_empty_context(tiny_gguf: Path) -> None:
    llm = Llama(tiny_gguf, n_ctx=256, n_threads=1)
    wanted = llm([1, 5, 9], max_tokens=4, temperature=0)["choices"][0]["text"]
    llm.reset()
    llm.eval([1, 5, 9])
    state = llm.save_state()
    state.llama_state = state.llama_state[:-64]
    state.llama_state_size -= 64
    llm.eval([7, 7])
    with pytest.raises(LlamaError, match="damaged"):
        llm.load_state(state)
    assert llm.n_tokens == 0
    assert llm([1, 5, 9], max_tokens=4, temperature=0)["choices"][0]["text"] == wanted


def test_a_stream_whose_context_was_used_says_so(tiny_gguf: Path) -> None:
    llm = Llama(tiny_gguf, n_ctx=256, n_threads=1)
    stream = llm("one two", max_tokens=20, stream=True)
    next(stream)
    llm("three", max_tokens=2)
    with pytest.raises(LlamaError, match="another call has used"):
        list(stream)
    assert llm("four", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_an_error_in_a_logits_processor_is_raised(tiny_gguf: Path) -> None:
    def divide(_ids: Any, scores: Any) -> Any:
        return scores * (1 // 0)

    llm = Llama(tiny_gguf, n_ctx=256, n_threads=1)
    with pytest.raises(ZeroDivisionError):
        llm("x", logits_processor=[divide])


def test_seeds(tiny_gguf: Path) -> None:
    def text(**options: Any) -> str:
        llm = Llama(tiny_gguf, n_ctx=256, n_threads=1, **options)
        answer: str = llm("one two", max_tokens=24, temperature=1.5)["choices"][0]["text"]
        return answer

    assert len({text() for _ in range(3)}) == 3
    assert text(seed=7) == text(seed=7)
    assert text(seed=-1) != text(seed=-1)
