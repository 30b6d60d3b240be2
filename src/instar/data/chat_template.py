"""Dialogues as text, by a template in Jinja as transformers' ``apply_chat_template`` reads it.

A folder that carries a template's source therefore works there too.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from instar.errors import UserError

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant")
# What an assistant that uses tools does before it speaks, in further keys of its message (MOSS).
TOOL_FIELDS = ("inner_thoughts", "commands", "results")

# The variable that a template writes where what is to be learnt begins, and where it ends.
_EDGE = "generation_edge"


@dataclass(frozen=True)
class ChatTemplate:
    """How messages become one text.

    The named templates (`NAMES`): ``chatml`` (OpenAI's), ``vicuna`` (FastChat's v1.1), ``alpaca``
    (Stanford's, whose later turns follow an EOS and an empty line), ``llama2`` (the chat models of
    LLaMA 2), ``plain`` (the contents end to end; an EOS after each of the assistant's), and those
    of the models ``baichuan``, ``baichuan2``, ``chatglm`` (the first), ``chatglm2``, ``chatglm3``
    and ``moss`` (whose meta instruction is the system message, and whose plugins are
    `TOOL_FIELDS`). None writes a BOS before the dialogue: that is the tokenizer's, as before any
    other text, unless `bos` says that there is none.

    What is to be learnt of a dialogue a template may say with ``{% generation %}`` blocks, as
    transformers has them; where it has none, it is what the assistant says (see
    `dialogues.encode_dialogue`).

    Attributes:
      name: what errors call the template.
      source: Jinja.
      required: the special tokens that it cannot do without.
      stop_strings: texts, besides `stop_ids`, that end a generated turn.
      stop_tokens: special tokens that do, besides those that `stop_ids` finds in the template.
      bos: whether a BOS stands before the dialogue where a tokenizer's texts begin with one.
    """

    name: str
    source: str
    required: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    bos: bool = True

    def __post_init__(self):
        """Raises UserError where `source` is not Jinja."""
        try:
            _compile(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template {self.name} is not valid Jinja: {error}") from None

    @classmethod
    def named(cls, name: str) -> "ChatTemplate":
        """Returns one of the templates that come with Instar.

        Raises:
          UserError: there is none of this name.
        """
        if name not in _DETAILS:
            raise UserError(f"there is no chat template {name!r}; choose from {', '.join(NAMES)}")
        file = resources.files("instar.data") / "templates" / f"{name}.jinja"
        return cls(name, file.read_text(encoding="utf-8"), **_DETAILS[name])

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str,
        eos_token: str,
        add_generation_prompt: bool = False,
        edge: str = "",
    ) -> str:
        """Returns the text of a dialogue.

        Args:
          messages: dicts with a "role", one of `ROLES`, and a "content"; an assistant's may have
            `TOOL_FIELDS`, and other keys are ignored.
          bos_token, eos_token: their names, which the template may write.
          add_generation_prompt: whether to end with what comes before an assistant's content.
          edge: what to write at both ends of each ``{% generation %}`` block.

        Raises:
          UserError: a message is malformed, or the template refuses the dialogue.
        """
        messages = checked_messages(messages)
        variables = {
            "tools": None,
            "documents": None,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": add_generation_prompt,
            _EDGE: edge,
        }
        try:
            return _compile(self.source).render(messages=messages, **variables)
        except Exception as error:  # a template can fail in as many ways as a program
            index = self._refused(messages, variables)
            raise UserError(
                f"chat template {self.name} refuses messages[{index}] "
                f"(role {messages[index]['role']!r}): {' '.join(str(error).split())}"
            ) from None

    def _refused(self, messages: Sequence[Message], variables: Mapping[str, object]) -> int:
        """Returns the index of the first message with which the dialogue cannot be rendered."""
        for index in range(len(messages)):
            try:
                _compile(self.source).render(messages=messages[: index + 1], **variables)
            except Exception:
                return index
        return len(messages) - 1


# What the templates in templates/ need to know besides their source.
_DETAILS = {
    "alpaca": {"stop_strings": ("\n### Instruction:",)},
    "baichuan": {"required": ("<reserved_102>", "<reserved_103>"), "bos": False},
    "baichuan2": {"required": ("<reserved_106>", "<reserved_107>"), "bos": False},
    "chatglm": {"required": ("[gMASK]", "<sop>", "<eop>"), "bos": False},
    "chatglm2": {"required": ("[gMASK]", "sop"), "bos": False},
    "chatglm3": {
        "required": ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
        "stop_tokens": ("<|observation|>",),
        "bos": False,
    },
    "chatml": {"required": ("<|im_start|>", "<|im_end|>")},
    "llama2": {},
    "moss": {"required": ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"), "bos": False},
    "plain": {},
    "vicuna": {},
}
NAMES = tuple(_DETAILS)


def checked_messages(messages: Sequence[Message]) -> list[Message]:
    """Returns the role and content of each message, and an assistant's `TOOL_FIELDS`.

    Raises:
      UserError: `messages` is no dialogue; names the message.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError("messages must be a list of at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'messages[{index}] must be a dict with "role" and "content"')
        role = message.get("role")
        if role not in ROLES:
            raise UserError(
                f"messages[{index}].role must be one of {', '.join(ROLES)}, not {role!r}"
            )
        fields = [name for name in TOOL_FIELDS if role == "assistant" and name in message]
        texts = {name: message.get(name) for name in ("content", *fields)}
        for name, text in texts.items():
            _check_text(text, f"messages[{index}].{name}")
        checked.append({"role": role} | texts)
    return checked


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name} must be a text, not {type(text).__name__}")
    if lone := re.search("[\ud800-\udfff]", text):
        raise UserError(
            f"{name} is not valid Unicode: remove the lone surrogate at character {lone.start()}"
        )


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    """Compiles a template with what transformers offers it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """Reads the blocks by which a template tells transformers what the assistant wrote.

    At both ends of one stands the variable `_EDGE`.
    """

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        block = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.Name(_EDGE, "load")], lineno=line) for _ in range(2)
        )
        return [begin, *block, end]


def _tojson(value: object, ensure_ascii: bool = False, **options: object) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
