"""The pages under docs/reference that follow from the code: Python, command line, configuration, HTTP.

python docs/generate.py           # writes them
python docs/generate.py --check   # exit code 1 if one differs from what the code gives
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import ephemera
from ephemera import cli, config
from ephemera.config import Settings
from ephemera.serving.http import app as http

FOLDER = Path(__file__).parent / "reference"
HEAD = "<!-- Written by `python docs/generate.py`; a test compares. Change the code, not this page. -->\n\n"


def pages() -> dict[str, str]:
    made = {"python.md": python_page, "cli.md": cli_page, "configuration.md": configuration_page, "http.md": http_page}
    return {name: HEAD + "\n\n".join(filter(None, page())).rstrip() + "\n" for name, page in made.items()}


def cell(text: str) -> str:
    """Text within a table."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{cell(text)}`" if text else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Python


def python_page() -> Iterator[str]:
    yield "# Python"
    yield "What `import ephemera` offers. Letters of shapes stand in [Equations to code](../concepts/equations.md)."
    for name in ephemera.__all__:
        item = getattr(ephemera, name)
        yield f"## {name}"
        yield signature(item, name)
        yield prose(item)
        if inspect.isclass(item):
            yield from members(item)


def members(item: type) -> Iterator[str]:
    """Public methods and properties that the class itself defines."""
    for name, value in vars(item).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"### {item.__name__}.{name}"
            told = inspect.signature(cast(Any, value.fget)).return_annotation
            yield f"Property: `{told}`."
            yield prose(value)
        elif inspect.isfunction(value) or isinstance(value, classmethod | staticmethod):
            yield f"### {item.__name__}.{name}"
            yield signature(getattr(item, name), f"{item.__name__}.{name}")
            yield prose(getattr(item, name))


def prose(item: Any) -> str:
    """A docstring, if it is the item's own: not one that a dataclass makes of its fields, or a base class has."""
    text = inspect.cleandoc(item.__doc__ or "")
    if inspect.isclass(item) and ("__doc__" not in vars(item) or text.startswith(f"{item.__name__}(")):
        return ""
    return text.replace("*", "\\*")


def signature(item: Any, name: str) -> str:
    found = inspect.signature(item)
    parts, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        told = "" if parameter.annotation is parameter.empty else f": {words(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {value(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{told}{default}")
    gives = "" if found.return_annotation in (found.empty, None, "None") else f" -> {words(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){gives}"
    if len(line) > 100:
        line = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){gives}"
    return f"```py\n{line}\n```"


def words(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def value(default: Any) -> str:
    text = repr(default)
    return "..." if " at 0x" in text or "<" in text or len(text) > 60 else text


# The command line


def cli_page() -> Iterator[str]:
    yield "# Command line"
    yield "Answers go to standard output, everything else to standard error. A mistake is one line and exit code 2."
    yield from commands(typer.main.get_command(cli.app), "ephemera")


def commands(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    if inner is not None:
        if name != "ephemera":
            yield f"## {name}"
            yield inspect.cleandoc(command.help or "")
        for key, sub in inner.items():
            yield from commands(sub, f"{name} {key}")
        return
    yield f"{'###' if name.count(' ') > 1 else '##'} {name}"
    yield inspect.cleandoc(command.help or "")
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    usage = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
    yield f"```text\n{' '.join([name, '[OPTIONS]', *usage])}\n```"
    rows = [parameter(p) for p in command.params if p.name != "help" and not p.hidden]
    if rows:
        yield table(["option", "type", "default", "what"], rows)
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.strip() not in ("", "Examples:")]
    yield "```bash\n" + "\n".join(examples) + "\n```"


def parameter(p: Any) -> list[str]:
    argument = not p.opts[0].startswith("-")
    name = p.name.upper() if argument else ", ".join([*p.opts, *p.secondary_opts])
    annotation = p.type_descriptor.annotation
    kind = "" if getattr(p, "is_flag", False) else kind_words(annotation)
    limits = [f"{sign} {bound:g}" for sign, bound in ((">=", p.min), ("<=", p.max)) if bound is not None]
    shown = not getattr(p, "is_flag", False) and p.show_default and p.default is not None
    default = code(str(p.default)) if shown else "required" if p.required else ""
    return [code(name), cell(", ".join([kind, *limits]).strip(", ")), default, cell(p.help or "")]


# Configuration


def configuration_page() -> Iterator[str]:
    yield "# Configuration"
    yield (
        "Settings come from a YAML file (`--config`) and from `--set a.b=value`; `--print-config` prints all of them. Unknown "
        "settings are refused with the nearest name. A section's settings stand under the class that it links to."
    )
    kinds = [getattr(config, name) for name in config.__all__]
    kinds = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Settings) and kind is not Settings]
    for kind in kinds:  # the list grows: what a setting holds has a section too
        for annotation in (field.annotation for field in kind.model_fields.values()):
            held = [inner for inner in (annotation, *get_args(annotation)) if inspect.isclass(inner)]
            kinds += [inner for inner in held if issubclass(inner, Settings) and inner not in kinds]
    top = [kind for kind in kinds if (kind.__doc__ or "").startswith("`ephemera")]
    for kind in [*top, *(kind for kind in kinds if kind not in top)]:
        yield f"## {kind.__name__}"
        yield "" if "__doc__" not in vars(kind) else inspect.cleandoc(kind.__doc__ or "").rstrip(".") + "."
        yield table(["setting", "type", "default", "what"], [setting(n, f) for n, f in kind.model_fields.items()])


def setting(name: str, field: FieldInfo) -> list[str]:
    annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return [code(name), cell(kind_words(annotation)), default_words(field), cell(field.description or "")]


def default_words(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, Settings):
        return code(json.dumps(changed(default))) if changed(default) else "its own"
    if isinstance(default, list) and any(isinstance(item, Settings) for item in default):
        return code(json.dumps([changed(item) if isinstance(item, Settings) else item for item in default]))
    return code(json.dumps(default))


def changed(settings: Settings) -> dict[str, Any]:
    """What these settings set besides their class's defaults."""
    return settings.model_dump(mode="json", exclude_unset=True)


def kind_words(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([kind_words(inner[0]), *(word for extra in inner[1:] if (word := limit_words(extra)))])
    if origin is Literal:
        return " or ".join(f"`{item}`" for item in inner)
    if origin in (Union, UnionType):
        return " or ".join(kind_words(item) for item in inner if item is not NoneType)
    if origin in (list, dict):
        parts = [kind_words(part) for part in inner]
        return f"list of {parts[0]}" if origin is list else " to ".join(parts)
    return plain_words(annotation)


def plain_words(annotation: Any) -> str:
    if inspect.isclass(annotation) and issubclass(annotation, Settings):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def limit_words(extra: Any) -> str:
    for kind, sign, member in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
        if isinstance(extra, kind):
            return f"{sign} {getattr(extra, member):g}"
    if isinstance(extra, MinLen):
        return f"at least {extra.min_length}"
    if isinstance(extra, MaxLen):
        return f"at most {extra.max_length}"
    return "" if not isinstance(extra, FieldInfo) else ", ".join(filter(None, map(limit_words, extra.metadata)))


# HTTP


def http_page() -> Iterator[str]:
    nobody = cast(Any, None)  # routes are described without a model
    schema = http.create_app(nobody, nobody, nobody, http.Settings()).openapi()
    yield "# HTTP"
    yield (
        "The routes of `ephemera serve`, from the document that it gives at `/openapi.json`. [Serve](../guides/serve.md) says "
        "what the fields mean, and what `ephemera` in a response holds."
    )
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            yield f"## {method.upper()} {path}"
            if body := route.get("requestBody"):
                yield f"Body: {schema_words(body['content']['application/json']['schema'])}."
            answers = route["responses"].items()
            yield table(["status", "when"], [[code(status), cell(answer["description"])] for status, answer in answers])
    yield "# Bodies"
    for name, item in schema["components"]["schemas"].items():
        yield f"## {name}"
        yield cell(item.get("description", ""))
        needed = item.get("required", [])
        rows = []
        for key, inner in item.get("properties", {}).items():
            default = "required" if key in needed else code(json.dumps(inner["default"])) if "default" in inner else ""
            rows.append([code(key), cell(schema_words(inner)), default, cell(inner.get("description", ""))])
        yield table(["field", "type", "default", "what"], rows)


def schema_words(item: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in item:
        name = item["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in item:
        return " or ".join(schema_words(one) for one in item["anyOf"] if one != {"type": "null"})
    if "enum" in item:
        return " or ".join(code(json.dumps(one)) for one in item["enum"])
    if "const" in item:
        return code(json.dumps(item["const"]))
    kind = item.get("type", "any")
    if kind == "array":
        kind = f"list of {schema_words(item.get('items', {}))}"
    signs = {"ge": ">=", "minimum": ">=", "gt": ">", "exclusiveMinimum": ">", "le": "<=", "maximum": "<="}
    signs |= {"exclusiveMaximum": "<", "minLength": "length >=", "maxLength": "length <=", "maxItems": "at most"}
    signs |= {"minItems": "at least"}
    limits = [f"{sign} {item[key]}" for key, sign in signs.items() if key in item and abs(item[key]) < 2**53]
    return ", ".join([kind, *limits])


def main() -> int:
    found, check = pages(), "--check" in sys.argv[1:]
    wrong = [
        name for name, text in found.items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text
    ]
    if check:
        print("\n".join(f"docs/reference/{name} is not what the code gives; run docs/generate.py" for name in wrong))
        return int(bool(wrong))
    for name, text in found.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
