"""From sources of text or dialogues to a prepared data set: `instar prepare`."""

from collections.abc import Iterator

from etils import epath
from rich.console import Console

from instar.config import build, to_dict
from instar.data.chat_template import ChatTemplate
from instar.data.dataset import CHAT_TEMPLATE, FORMAT
from instar.data.encoders import (
    DialogueEncoder,
    Encoder,
    TextEncoder,
    check_template,
    open_template,
    with_bos,
)
from instar.data.formats import in_words
from instar.data.infilling import BlankTokens, InfillingEncoder
from instar.data.prepare_config import PrepareConfig, draw, is_held_out
from instar.data.source_writer import SourceWriter, first_skipped, in_disorder, write_text
from instar.data.sources import Record, SourceConfig, read_records, source_files
from instar.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from instar.errors import UserError
from instar.workdir import claim, read_json, write_json

__all__ = ["PrepareConfig", "prepare"]


def prepare(config: PrepareConfig, workdir: epath.PathLike) -> dict:
    """Writes a prepared data set and returns its manifest, which is written last.

    A preparation that was interrupted goes on after the last whole shard, with the same result;
    one that is finished is left as it is. One that failed before its first whole shard does not
    bind the workdir: the next may have another config.

    Raises:
      UserError: a source is missing, empty or mostly broken; the chat template cannot be read, or
        it or `infilling` needs a token that the tokenizer lacks; the workdir cannot be written or
        belongs to another config.
    """
    folder = epath.Path(workdir)
    if "://" in str(folder):
        raise UserError(
            f"workdir {folder}: ArrayRecord files are written to a local or mounted disk only; "
            "prepare the data there"
        )
    path = folder / "manifest.json"
    if path.exists():  # the sources need not be there any more
        claim(folder, config)
        return read_json(path)
    files = {source.name: source_files(source) for source in config.sources}
    _clear_unbegun(folder, config)
    saved = folder / CHAT_TEMPLATE
    template = open_template(config.chat_template, saved) if config.chat_template else None
    tokenizer = _existing_tokenizer(config, folder / "tokenizer")
    if template and tokenizer:
        check_template(tokenizer, template)
    if config.infilling and tokenizer:
        BlankTokens.of(config.infilling, tokenizer)
    claim(folder, config)
    console = Console(stderr=True)
    if tokenizer is None:
        with console.status("tokenizer"):
            control = config.infilling.tokens.values() if config.infilling else ()
            texts = _training_texts(config, files)
            tokenizer = train_tokenizer(texts, config.tokenizer, control)
    console.print(f"tokenizer: {tokenizer.vocab_size} tokens, {tokenizer.digest[:12]}")
    _save_tokenizer(tokenizer, folder / "tokenizer")
    if template:
        template = with_bos(template, tokenizer)
        check_template(tokenizer, template)
        write_text(saved, template.source)
    sources = {}
    for source in config.sources:
        encode = _encoder(source, config, tokenizer, template)
        place, vocab_size = folder / source.name, tokenizer.vocab_size
        writer = SourceWriter(config, source, files[source.name], place, encode, vocab_size)
        with console.status(source.name) as status:
            sources[source.name] = facts = writer.write(status.update)
        for line in _told(source, config, files[source.name], place, facts):
            console.print(line, markup=False, soft_wrap=True)
        for length, lost in facts.get("rows", {}).items():
            console.print(
                f"{source.name} in rows of {length} tokens: {lost['cut']:,} dialogues cut, "
                f"{lost['too_long']:,} too long"
            )
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.digest,
        "config": to_dict(config),
        "sources": sources,
    }
    write_json(path, manifest)
    return manifest


def _clear_unbegun(folder: epath.Path, config: PrepareConfig) -> None:
    """Removes what would bind this preparation to one that left no whole shard.

    That is the template, whose file may have been mended by now, and where the config is another,
    all that was made. The old config goes last, so that this too may be interrupted.
    """
    path = folder / "config.json"
    if not path.exists() or any(folder.glob("*/progress.json")):
        return
    try:
        previous = build(read_json(path), PrepareConfig)
    except UserError:  # the folder of something else, which `claim` refuses
        return
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    if previous == config:
        return
    for name in ("tokenizer", *(source.name for source in previous.sources)):
        (folder / name).rmtree(missing_ok=True)
    path.unlink()


def _existing_tokenizer(config: PrepareConfig, folder: epath.Path) -> Tokenizer | None:
    """The tokenizer in `folder`, else the one that the config names; None: it is to be trained."""
    if folder.exists():
        return load_tokenizer(folder)
    path = config.tokenizer.path
    return None if path is None else load_tokenizer(epath.Path(path))


def _save_tokenizer(tokenizer: Tokenizer, folder: epath.Path) -> None:
    if folder.exists():
        return
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():
        partial.rmtree()
    tokenizer.save(partial)
    partial.rename(folder)


def _encoder(
    source: SourceConfig, config: PrepareConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Encoder:
    if source.dialogue is not None:
        return DialogueEncoder(tokenizer, template)
    if config.infilling is not None:
        limit = max(config.sequence_lengths) + 1
        return InfillingEncoder(tokenizer, config.infilling, limit, config.seed)
    return TextEncoder(tokenizer)


def _told(
    source: SourceConfig,
    config: PrepareConfig,
    files: list[epath.Path],
    folder: epath.Path,
    facts: dict,
) -> Iterator[str]:
    """What became of a source, line by line, and what the user may want to change."""
    trained, held_out = (facts["splits"][split]["documents"] for split in ("train", "held_out"))
    yield (
        f"{source.name}: {trained:,} documents to learn from, {held_out:,} held out, "
        f"{facts['tokens']:,} tokens, {facts['skipped']:,} records skipped"
    )
    if facts["skipped"]:
        first, path = in_words(first_skipped(folder)), folder / "skipped.jsonl"
        yield f"{source.name}: the first skipped is {first}; all are listed in {path}"
    if config.held_out and not held_out:
        # Read again: a source of which none is held out is small.
        records = (r for file in files for r in read_records(source, file))
        draws = {draw(r.text, str(config.seed)) for r in records if r.text is not None}
        lowest = sorted(draws)[:2]
        remedy = f"set held_out to {sum(lowest) / 2:.4g} or more" if lowest[1:] else "add documents"
        yield (
            f"{source.name}: held_out={config.held_out} holds out none, so that no loss can be "
            f"measured on it: {remedy} and prepare into a new --workdir"
        )


def _training_texts(config: PrepareConfig, files: dict[str, list[epath.Path]]) -> Iterator[str]:
    """What a tokenizer is trained on: a sample of the training split.

    It is taken from all over each source, and of each at most its share of the bytes.

    Raises:
      UserError: all records of a source are broken.
    """
    share = config.tokenizer.train_bytes // len(config.sources)
    for source in config.sources:
        # Drawn over the whole source, which is often sorted. (A packed one gives more text than
        # its files have bytes: then only the cap stops it.)
        fraction = share / max(1, sum(file.stat().length for file in files[source.name]))
        left, whole, broken, first = share, 0, 0, None
        records = (r for file in files[source.name] for r in read_records(source, file))
        for record in records:
            if record.text is None:
                broken, first = broken + 1, first or record
                continue
            whole += 1
            if (
                is_held_out(record.text, config)
                or draw(record.text, f"tokenizer\0{config.seed}") >= fraction
            ):
                continue
            text = _words(record)
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
        if first and not whole:
            reason = in_disorder(source, config, broken, broken, vars(first))
            raise UserError(f"source {source.name}: {reason}")


def _words(record: Record) -> str:
    """A whole record's text as a tokenizer is to learn it: of a dialogue, what is said in it."""
    if record.messages is None:
        return record.text
    words = (text for each in record.messages for name, text in each.items() if name != "role")
    return "\n".join(words)
