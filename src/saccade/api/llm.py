"""LLM: a checkpoint, ready to generate. The Python API of Saccade.

A door with a name for each thing that can be asked; loading/load.py opens the model, asking.py asks its engine, chat.py
reads chats, push.py brings new weights. Any thread may call it, and any number of `stream`s may be open: all share the
steps. Next: those, and engine/shared.py.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from os import PathLike

from saccade.api.asking import complete_all, open_stream, score_tokens
from saccade.api.chat import ChatCompletion, Chats, ChatStream, choose_options, find_format_or_obstacle
from saccade.api.loading.load import LoadedModel
from saccade.api.loading.prepare import PreparedModel, prepare
from saccade.api.outputs import Completion, Stream
from saccade.api.push import Announced, Push, begin_push
from saccade.base.values import show
from saccade.chat.types import ChatOptions, Message, Tool
from saccade.engine.engine import Engine
from saccade.engine.pace import Stats
from saccade.engine.params import SamplingParams, choose_params, list_params
from saccade.engine.steps.selections import SelectionParts
from saccade.errors import ConfigError
from saccade.parallel.abreast import Abreast
from saccade.parallel.ranks import Ranks
from saccade.text.prompts import Prompt, as_prompts, check_ids
from saccade.text.tokenizer import require_tokenizer


class LLM:
    """A model, loaded and ready: `LLM("path/to/model").generate(prompts, SamplingParams(max_tokens=64))`.

    - `model`: a directory, a .safetensors file beside its config.json, a Hugging Face id, or None for the small model
      that comes with the package. `path` is another name of it, for keywords only.
    - `device`: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1".
    - `dtype`: "auto" (weights as they are stored, else BF16) or "float32".
    - `mtp`: whether the layer that guesses tokens ahead is loaded, if the files have it.
    - `cache_tokens`: tokens of all requests that the cache holds; None: as many as memory allows.
    - `max_batch_tokens`: tokens of one step, so of a piece of a prompt; None: 512 on a CPU, 4,096 on a GPU.
    - `max_mixed_tokens`: tokens of a step in which some requests decode while prompts are read, so how long those wait
      for a token; prompts have half of it at least. None: as many as take 150 ms on an H200, by the model's size (768
      of DeepSeek-V3.2 on eight GPUs), and on a CPU as `max_batch_tokens`.
    - `max_requests`: requests that run at the same time, 64 by default; others wait.
    - `launch_ahead`: whether a step is launched before the one in front of it has been read: "on", "off", or "auto",
      which is on a GPU where 16 requests or more decode. Who comes meanwhile waits for a step more. The text is the
      same. Steps with drafts, log-probabilities, penalties or grammars, and of families with states, are waited for.
    - `index_cache`: "bf16", or "fp8", which keeps the indexer's keys in 132 bytes instead of 256 and quantises its
      queries: half the bytes to score, another rounding.
    - `latent_cache`: "bf16", or "fp8", which keeps latents as e4m3 codes and their rotated keys in BF16: 644 bytes of
      DeepSeek's instead of 1,152 for each layer and token, so nearly twice the tokens in the same memory.
    - `activations`: what products see of their inputs in prompts of more than 128 tokens: "exact" (16 bits and more),
      "bf16", or "fp8", which is e4m3 by 128 where weights are FP8 by 128x128 and BF16 elsewhere. Answers and short
      prompts are exact. "auto" is "fp8" on a GPU, as published checkpoints say, and "exact" in plain torch.
    - `progress`: a function that is told the bytes loaded so far and the bytes in all (before that, those fetched).
    - `kernels`: "fast" (Triton, CUDA graphs), "reference" (plain torch), or "auto": fast on a GPU that can.
    - `speculate`: tokens that the MTP layer guesses ahead in each step, 0 to 5, or "auto": as many as pay, measured
      while it runs. The text is the same, the steps are fewer; `stats` tells how they fared.
    - `prefix_cache`: whether pages of the cache are kept for requests that begin with the same tokens, which are then
      found instead of computed. "auto" is True, but for families whose layers keep states.
    - `revision`: the branch, tag or commit of a Hugging Face id; None: "main".
    - `threads`: that compute on a CPU; None: as many as its matrices pay for, one for a small model, unless
      OMP_NUM_THREADS or torch.set_num_threads says. The number is torch's, one for the whole process: it stays, and
      holds for all other code there.
    - `tp`: ranks that share the model, one GPU each; on a CPU, one process each. This process is rank 0 and starts the
      others, unless torchrun has started it: then every process calls this, and only rank 0 comes back.
    - `ep`: ranks that divide the routed experts among them; it divides tp.
    - `check_ranks`: compare what all ranks compute after each step, which is slow, and name the first layer that
      differs.

    What config, headers, tokenizer and memory can refuse is refused before the weights of an id are fetched.
    `print(llm.settings)` shows what every "auto" and None became.
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        mtp: bool = True,
        cache_tokens: int | None = None,
        max_batch_tokens: int | None = None,
        max_requests: int | None = None,
        index_cache: str = "bf16",
        progress: Callable[[int, int], None] | None = None,
        kernels: str = "auto",
        speculate: int | str = 0,
        revision: str | None = None,
        threads: int | None = None,
        prefix_cache: bool | str = "auto",
        *,
        tp: int = 1,
        ep: int = 1,
        check_ranks: bool = False,
        activations: str = "auto",
        latent_cache: str = "bf16",
        max_mixed_tokens: int | None = None,
        launch_ahead: str = "auto",
        path: str | PathLike[str] | None = None,
    ) -> None:
        """Load a model, as `help(LLM)` describes. It is proven complete before a tensor is read; a SaccadeError of any
        kind leaves nothing loaded."""
        if not (path is None or model is None):
            raise ConfigError(f"model and path are one argument; expected one of them, found {show((model, path))}")
        path = model if path is None else path
        prepared = prepare(
            path, device, dtype, mtp, cache_tokens, max_batch_tokens, max_requests, index_cache, kernels, speculate,
            revision, threads, prefix_cache, tp, ep, check_ranks, activations, latent_cache, max_mixed_tokens,
            launch_ahead,
        )  # fmt: skip
        self._open(LoadedModel(prepared, progress))

    @classmethod
    def of(
        cls,
        prepared: PreparedModel,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
        make_engine: Callable[..., Engine] = Engine,
        abreast: Abreast | None = None,
    ) -> "LLM":
        """The model that prepare.py has let pass. Fetches its weights if they are not here yet, and loads them. Of a
        model with several ranks, rank 0's starts the others.

        `ranks`: those that this process has joined already, whose share was prepared. Each loads its share, and all
        must do the same from here on: add the same requests in the same order, and step together. `abreast`: those of
        this machine, that read the same files now.
        """
        llm = cls.__new__(cls)
        llm._open(LoadedModel(prepared, progress, ranks, make_engine, abreast))
        return llm

    def _open(self, loaded: LoadedModel) -> None:
        prepared = loaded.prepared
        self.config, self.settings, self.plan = prepared.config, prepared.settings, prepared.plan
        self.tokenizer, self.no_text = prepared.side.tokenizer, prepared.side.obstacle
        self.chat_format, self.no_chat = find_format_or_obstacle(prepared.source.directory, self.config.model_type)
        self._loaded, self.model = loaded, loaded.model
        self.engine, self.shared = loaded.engine, loaded.shared

    def close(self) -> None:
        """End the ranks, and refuse further requests; those under way end with RankError. Does nothing with one rank.
        A `with` block does so at its end, and so do the end of the process and of the last reference. Processes that
        compile kernels end, too."""
        self._loaded.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        capture_selection: bool | str | PathLike[str] = False,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One Completion a prompt, in order; n in a row where params ask for n. `prompts` are one or several, each text
        or token ids; `params` are for all, or one each, and `sampling_params` is another name of them. With
        `capture_selection` each Completion has its `selections`; a path instead of True keeps them in a file, written
        as they come, which SelectionReader reads: its request i is Completion i.

        Raises RequestError, naming every prompt that cannot be served, before anything runs. Raises NumericsError if
        the model's numbers are not finite for a prompt, after all others have ended: `completions` of the error holds
        every Completion, in order, and those that failed have `error`. NoAnswerError where a grammar and other options
        leave no token to choose.
        """
        asked = as_prompts(prompts)
        options = list_params(choose_params(params, sampling_params), len(asked))
        positions = getattr(self.config, "index_topk", 0)
        return complete_all(self.shared, asked, self.encode, options, capture_selection, positions)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        selections: SelectionParts | None = None,
    ) -> Stream:
        """The answer to `prompt` as it comes, an iterator of one Piece a step. `params` may be called
        `sampling_params`. `selections` takes what each step selects: SelectionWriter.open_request makes one. Closing or
        dropping it cancels the request.

        Raises RequestError at once, not at the first piece.
        """
        params = choose_params(params, sampling_params)
        return open_stream(self.shared, self.encode(prompt), params, selections)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        reasoning_effort: str | None = None,
        options: ChatOptions | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> ChatCompletion:
        """The answer to `messages`, each {"role": ..., "content": ...} in the shape of OpenAI's API, with the `tools`
        that the model may call. `params` are as in `generate`, and `sampling_params` is another name of them; what they
        ask of the answer is asked of its content. `thinking`: whether the model thinks first; None: as its format does.
        `reasoning_effort`: how long, where its format has levels. `options` has more: calls that must come, a limit on
        reasoning.

        Raises RequestError for messages that cannot be written, and as `generate` does.
        """
        options = choose_options(options, thinking, reasoning_effort)
        asked, params = self._chats.ask(messages, tools, choose_params(params, sampling_params), options)
        return asked.read(self.generate([asked.token_ids], params)[0])

    def stream_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
        reasoning_effort: str | None = None,
        options: ChatOptions | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> ChatStream:
        """As `chat`, with the same `messages`, `tools`, `params` (or `sampling_params`), `thinking`, `reasoning_effort`
        and `options`: the answer as it comes, an iterator of one ChatPiece a step."""
        options = choose_options(options, thinking, reasoning_effort)
        asked, params = self._chats.ask(messages, tools, choose_params(params, sampling_params), options)
        return ChatStream(self.stream(asked.token_ids, params), asked)

    @property
    def _chats(self) -> Chats:
        """Of the format as it is now: a caller may set another one."""
        return Chats(self.chat_format, self.no_chat, self.tokenizer, self.no_text)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """For n `token_ids` the n - 1 log-probabilities, each of a token given those before it. Raises RequestError,
        or NumericsError where one of them is not finite."""
        return score_tokens(self.shared, check_ids(token_ids))

    @property
    def stats(self) -> Stats:
        """How drafts and the prefix cache fared over all requests so far; print it."""
        with self.shared.turns.turn():
            pace = self.engine.pace
            tally = deepcopy(self.engine.tally)
            told = (self.settings.speculate, dict(pace.chosen), str(pace), tally, self._loaded.kernels_of_drafts)
            return Stats(*told, self.engine.scheduler.prefix_tally)

    def push(self, announced: Announced, staged: bool | None = None) -> Push:
        """Begin a push of new weights: `announced` says of each tensor its dtype (as safetensors spells it) and shape.

        Proven before a byte moves: PlanError with every reason, and nothing has changed. `staged=False` writes over the
        running weights, None does if memory does not hold both. LoadError while another push is open.
        """
        loaded = self._loaded
        return begin_push(self.plan, loaded.held, self.shared, loaded.lead, self.settings.device, announced, staged)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a `prompt`; those given are checked to be integers, at least one."""
        if isinstance(prompt, str):
            return check_ids(require_tokenizer(self.tokenizer, "a text prompt", self.no_text).encode(prompt))
        return check_ids(prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens; RequestError without a tokenizer."""
        return require_tokenizer(self.tokenizer, "text", self.no_text).decode(token_ids)

    def step(self) -> None:
        """Run one engine step for everybody. What calls wait for steps itself; this is for looking on."""
        self.shared.step()
