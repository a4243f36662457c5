"""The process that renders a chat template: `python rendering.py`, started by `templates.render`.

Reads JSON lines: first the settings with the template, then one conversation per line
(`templates.Chat`). Answers each with a line: {"pieces": [[text, target], ...], "remarks": [...]},
with null as the text of the end token and the names of `templates.REMARKS` that apply, or
{"error": reason}. The system kills it if it takes too long. Imports nothing from lorax, to start
fast.
"""

import datetime
import json
import resource
import signal
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


def main() -> None:
    """Limit the memory of this process, compile the template, then render line by line."""
    settings = json.loads(sys.stdin.buffer.readline())
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = settings["memory"] if most == resource.RLIM_INFINITY else min(settings["memory"], most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    template = None

    def compiled():
        nonlocal template
        template = environment(settings["longest"]).from_string(settings["source"])
        return {}

    answer(settings, compiled)
    for line in sys.stdin.buffer:
        answer(settings, lambda line=line: rendered(template, json.loads(line), settings))


def answer(settings: dict, work) -> None:
    """Write the result of `work`, or write its error and exit. A template may raise anything."""
    signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
    try:
        line, ended = work(), False
    except MemoryError:
        line, ended = {"error": f"it needs more than {settings['memory'] >> 20} MiB"}, True
    except RecursionError:
        line, ended = {"error": "it is nested too deep, or a macro calls itself without end"}, True
    except Exception as error:
        line, ended = {"error": said(error)}, True
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    if ended:
        sys.exit()


def said(error: Exception) -> str:
    """An error as the reason in an answer: 300 characters of its text, with its type if it is
    neither Jinja's nor this module's."""
    text = str(error)[:300]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{text} (line {error.lineno})"
    ours = isinstance(error, jinja2.TemplateError | RefusedError)
    return text if ours and text else f"{type(error).__name__}: {text}"


class RefusedError(Exception):
    """The template can't render a conversation; the text says why."""


# ------------------------------------------------------------------------------------- a template


class Generation(Extension):
    """{% generation %}...{% endgeneration %} around the text that a model should learn.

    spans: (start, text) of each in the rendered text. length: characters rendered so far.
    """

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        self.used, self.spans, self.length = False, [], 0

    def parse(self, parser):
        """The block as a call of `_mark`; Jinja calls this at each tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        self.used = True
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        text = caller()
        self.spans.append((self.length, text))
        return text


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that give access to Python internals."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            Namespace.check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        Namespace.check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name):
        """Raises SecurityError for a name that begins with an underscore."""
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


class Dict:
    """`dict(...)` and `dict.fromkeys`, without access to the type itself."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


def environment(longest: int) -> ImmutableSandboxedEnvironment:
    """The same environment as transformers' for chat templates (utils/chat_template_utils.py)."""

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    now = datetime.datetime.now()  # one day for all rows
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    jinja.extend(longest=longest)
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = now.strftime
    jinja.globals["dict"] = Dict()
    jinja.globals["namespace"] = Namespace
    return jinja


def written(template, messages: list, special: dict, extra: dict, cue: bool = False) -> str:
    """The rendered messages; the extension then holds the spans that the template marked.

    special: {"eos_token": "</s>", ...}. cue: whether the generation prompt follows."""
    environment = template.environment
    marks = environment.extensions[Generation.identifier]
    marks.spans, marks.length, parts = [], 0, []
    variables = special | {"messages": messages, "add_generation_prompt": cue}
    variables |= {"tools": extra.get("tools"), "documents": extra.get("documents")}
    for part in template.root_render_func(template.new_context(variables)):
        parts.append(part)
        marks.length += len(part)
        if marks.length > environment.longest:
            raise RefusedError(f"it renders more than {environment.longest:,} characters")
    return "".join(parts)


def aliased(message: dict) -> dict:
    """A message with its reasoning under all names that templates read."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def with_text_arguments(message: dict) -> dict:
    """A message whose tool calls have their arguments as JSON text."""

    def spelled(call: dict) -> dict:
        if "function" in call:
            return call | {"function": spelled(call["function"])}
        return call | {"arguments": json.dumps(call.get("arguments"), ensure_ascii=False)}

    calls = message.get("tool_calls")
    return message | {"tool_calls": [spelled(call) for call in calls]} if calls else message


# ---------------------------------------------------------------------------------- conversations


def rendered(template, chat: dict, settings: dict) -> dict:
    """The answer to a conversation: its pieces, as `templates.render` explains, and remarks.

    chat: the fields of a `templates.Chat`. Raises RefusedError, and whatever the template raises.
    """
    messages, extra, start = chat["messages"], chat["extra"], settings["start"]

    def text(messages: list, cue: bool = False, extra: dict = extra) -> str:
        if not set(REASONING).isdisjoint(chat["carried"]):
            messages = [aliased(message) for message in messages]
        return written(template, messages, settings["special"], extra, cue)

    cue = not chat["learnt"]
    try:
        whole = text(messages, cue)
    except TypeError:  # DeepSeek's templates join the arguments of a call to other text
        messages = [with_text_arguments(message) for message in messages]
        whole = text(messages, cue)
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise RefusedError("it renders half of a character") from None
    marks = template.environment.extensions[Generation.identifier]
    spans, remarks = marks.spans, [] if whole.startswith(start) else ["start"]
    for name in chat["carried"]:
        without = [{k: v for k, v in message.items() if k != name} for message in messages]
        check_used(lambda without=without: text(without), whole, name)
    for name in extra:
        without = {k: v for k, v in extra.items() if k != name}
        check_used(lambda without=without: text(messages, extra=without), whole, name)
    if not chat["learnt"]:
        result = [(whole, False)]
    elif marks.used:
        result = marked(whole, spans, messages, set(chat["learnt"]))
        earlier = [text(messages[: i + 1]) for i in chat["learnt"]]
        remarks += [] if all(map(whole.startswith, earlier)) else ["marked"]
    else:
        result, further = turns(text, messages, chat["learnt"], settings["ends"])
        remarks += further
    if not (marks.used and chat["learnt"]):
        check_read(whole, messages)
    (first, target), *rest = result
    result = [(first.removeprefix(start), target), *rest]
    return {"pieces": [piece for piece in result if piece[0] != ""], "remarks": remarks}


def turns(text, messages: list, learnt: list[int], ends: list[str]) -> tuple[list, list[str]]:
    """(pieces, remarks) of a conversation up to its last target, from a template without marks.

    text(messages, cue=False) renders messages. A turn that the later ones change is no target: the
    model would learn to write what no prompt asks for. Raises RefusedError if the last target does
    not continue its own prompt."""
    last = max(learnt)
    whole = text(messages[: last + 1])
    result, at, remarks = [], 0, set()
    for i in sorted(learnt):
        before = text(messages[:i], cue=True)
        after = whole if i == last else text(messages[: i + 1])
        continued = len(before) >= at and after.startswith(before) and whole.startswith(after)
        if not continued and i == last:
            raise RefusedError(
                f"it does not render message {i} as the continuation of those before it and the "
                "generation prompt, so its words can't be told apart; it could mark them with "
                "{% generation %}"
            )
        if not continued:
            remarks.add("unstable")
            continue
        turn = after[len(before) :]
        check_words(turn, messages, [i])
        result += [(whole[at : len(before)], False), (turn, True)]
        if not any(end in turn for end in ends):
            result.append((None, True))
            remarks.add("ended")
        at = len(after)
    return result, sorted(remarks)


def check_used(render, whole: str, name: str) -> None:
    """Raises RefusedError if a field has no effect on the rendered conversation."""
    try:
        used = render() != whole
    except (jinja2.TemplateError, TypeError):
        used = True
    if not used:
        raise RefusedError(
            f"it has no use for the field {name!r}, which the record has; leave it out"
        )


def check_words(targets: str, messages: list, learnt: list[int]) -> None:
    """Raises RefusedError if the targets contain no word of the messages: a template that expects
    content in parts, e.g. for images, renders nothing from a plain text."""
    words = [word for i in learnt for word in messages[i]["content"].split()]
    if not (any(word in targets for word in words) if words else targets.strip()):
        which = ", ".join(map(str, learnt))
        raise RefusedError(f"it renders no word of message {which} as what is to be learnt")


def check_read(whole: str, messages: list) -> None:
    """Raises RefusedError for a message of no assistant that the template leaves out."""
    for i, message in enumerate(messages):
        words = message["content"].split() if message["role"] != "assistant" else []
        if words and not any(word in whole for word in words):
            raise RefusedError(f"it leaves out message {i}, of role {message['role']!r}")


def marked(whole: str, spans: list, messages: list, learnt: set[int]) -> list:
    """The spans marked by the template as targets, except in turns that are not to be learnt."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) == len(turns):
        spans = [span for span, i in zip(spans, turns, strict=True) if i in learnt]
    elif learnt != set(turns):
        raise RefusedError(
            f"it marks {len(spans)} parts with generation, and the record has {len(turns)} "
            "turns of the assistant, so that those not to be learnt can't be told apart"
        )
    result, at = [], 0
    for start, text in spans:
        if start < at or not whole.startswith(text, start):
            raise RefusedError(
                "its generation blocks are inside a macro, a set block or each other"
            )
        result += [(whole[at:start], False), (text, True)]
        at = start + len(text)
    check_words("".join(text for text, target in result if target), messages, sorted(learnt))
    return result


if __name__ == "__main__":
    main()
