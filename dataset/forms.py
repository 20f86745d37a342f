"""The forms that records come in, as their makers document them -> messages, clips and a solution. No torch.

    conversations  LLaVA and 2U1: from/value; `video`, `image` a name or a list. A set for 2U1's GRPO has no tags: the
                   clips stand before the first question. (2U1/Qwen-VL-Series-Finetune, README, Dataset Preparation)
                   LLaMA-Factory sharegpt: the same with `videos`, `images`, `system`. (its data/README.md; there both
                   `conversations` with from/value and `messages` with role/content are usual)
    messages       OpenAI: role/content, parts of type text, image_url; weight 0 = not learned (developers.openai.com,
                   guides/vision-fine-tuning); video_url as vLLM has it (docs.vllm.ai, features/multimodal_inputs)
                   ms-swift: `videos`, `images`, <video> and <image> tags; loss false = not learned; other fields, such
                   as `solution`, go to the rewards. (its docs/source_en/Customization/Custom-dataset.md)
                   TRL: the same, with parts {"type": "image"} that stand for the entries of `images`
    conversation   ms-swift sharegpt: [{"human": …, "assistant": …}], `system`
    prompt         TRL: messages or text, with `completion` or, for GRPO, any column for the rewards (accuracy_reward
                   reads `solution`); only the completion is learned. (its docs/source/dataset_formats.md)
    problem        Video-R1: `options`, `problem_type`, `process`, `solution`, `path`, `data_type`. The question is put
                   together as in its src/r1-v/src/open_r1/sft_video.py, less the wording of its prompt
    query          ms-swift query and response; instruction: Alpaca, as LLaMA-Factory and ms-swift have it

What stands apart as `solution` or `answer` is what the rewards judge by; it is also the answer to learn where the
record has no other. Columns that no form speaks of are left alone.
"""

import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

from model import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES["developer"] = "system"  # OpenAI's newer word
# Columns that change what a record means and that nothing here reads: where they hold something, the record is refused
UNREAD = ("tools", "audio", "audios", "objects", "chat_template_kwargs")


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str | list  # text, with tags in a user's turn; or typed parts
    trained: bool = True  # of the assistant: whether it is learned


class Talk(NamedTuple):
    """A record, whatever its form was."""

    messages: list[Message]
    clips: dict  # "video", "image" -> what the record names beside its messages: a name, a list of them, or None
    solution: str | None  # where it stands apart from the messages
    options: list[str]  # lettered, "A. Left"; [] where they are not apart from the question


class Form(NamedTuple):
    key: str  # tells the form
    name: str
    columns: tuple[str, ...]  # what else it may have
    read: Callable[[dict, str], list[Message]]


def read_form(record: dict, where: str) -> Talk:
    """What a record says. UserError, beginning with `where`, for no known form, and for what is not learned here."""
    found = [form for form in FORMS if record.get(form.key) is not None]
    if not found:
        raise unknown_form(record, where)
    keys = [form.key for form in found if form.key in ("conversations", "messages", "conversation")]
    if len(keys) > 1:
        raise UserError(f"{where}: found {' and '.join(keys)}; expected one of them")
    refuse_unread(record, where)
    messages, solution = found[0].read(record, where), read_solution(record, where)
    if solution is not None and messages[-1].role != "assistant":
        messages.append(Message("assistant", solution))
    system = read_text(record, "system", where)
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Talk(messages, read_clips(record, where), solution, read_options(record, where))


def unknown_form(record: dict, where: str) -> UserError:
    """One line: the keys found, and the form that has most of them, spelled alike or nearly so."""

    def likeness(form):
        known = (form.key, *form.columns)
        close = [difflib.get_close_matches(key, known, n=1, cutoff=0.75) for key in map(str, record)]
        return sum(map(bool, close)) + 0.5 * any(form.key in match for match in close)

    form = max(FORMS, key=likeness)
    keys = ", ".join(map(str, record))[:200] or "none"
    needs = f"{form.key}, with {', '.join(form.columns)} where needed"
    return UserError(f"{where}: no known form of record, its keys are: {keys}; the nearest is {form.name}: {needs}")


def refuse_unread(record: dict, where: str) -> None:
    for key in UNREAD:
        if record.get(key) not in (None, "", [], {}, "[]"):
            raise UserError(f"{where}: holds {key}, which nothing here reads; remove it, or leave the record out")
    if record.get("chosen") is not None:
        raise UserError(f"{where}: a preference (chosen, rejected); expected one answer: keep the chosen as completion")
    if record.get("label") is False:
        raise UserError(f"{where}: label is false, so its answer is a rejected one; leave such records out")


# -- Messages


def read_message(message, where: str, trained: bool = True) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: a turn is a {type(message).__name__}, expected an object")
    role = first_of(message, "from", "role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: unknown role {str(role)[:40]!r}; expected human/user, gpt/assistant or system")
    if message.get("tool_calls"):
        raise UserError(f"{where}: a tool call, which is not learned here; leave the record out")
    content = first_of(message, "value", "content")
    if not isinstance(content, (str, list)):
        raise UserError(f"{where}: the {role}'s turn holds {str(content)[:80]}; expected text or a list of parts")
    trained = trained and message.get("loss") is not False and message.get("weight") != 0
    return Message(ROLES[role], content, trained)


def first_of(record: dict, *keys: str):
    """The first value that is there: exports write null for what a record lacks."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def message_list(found, what: str, where: str, trained: bool = True) -> list[Message]:
    if not isinstance(found, list) or not found:
        told = "is empty" if found == [] else f"is a {type(found).__name__}"
        raise UserError(f"{where}: {what} {told}; expected a list of turns")
    return [read_message(message, where, trained) for message in found]


def from_conversations(record: dict, where: str) -> list[Message]:
    return message_list(record["conversations"], "conversations", where)


def from_messages(record: dict, where: str) -> list[Message]:
    return message_list(record["messages"], "messages", where)


def from_pairs(record: dict, where: str) -> list[Message]:
    pairs, messages = record["conversation"], []
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise UserError(f"{where}: conversation is {str(pairs)[:80]}; expected a list of human and assistant pairs")
    for pair in pairs:
        messages += [Message(ROLES[name], pair[name]) for name in ("human", "assistant") if pair.get(name) is not None]
    return [read_message({"role": role, "content": content}, where) for role, content, _ in messages]


def from_prompt(record: dict, where: str) -> list[Message]:
    """Only the completion is learned, as with TRL's completion_only_loss; the answers of the prompt are history."""
    prompt, completion = record["prompt"], record.get("completion")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages = message_list(prompt, "prompt", where, trained=False)
    return messages + (message_list(completion, "completion", where) if completion is not None else [])


def from_question(record: dict, where: str) -> list[Message]:
    """Video-R1, query and response, Alpaca: one question, with its options, and at most one answer."""
    question = read_text(record, next(key for key in QUESTIONS if record.get(key) is not None), where)
    more, options = read_text(record, "input", where), read_options(record, where)
    if more:
        question += f"\n{more}"
    if options:
        question = "\n".join([question.rstrip("\n"), "Options:", *options])
    messages = [*read_history(record, where), Message("user", question)]
    answer = next((said for key in ANSWERS if (said := read_text(record, key, where))), None)
    process, solution = read_text(record, "process", where), read_solution(record, where)
    if answer is None and process and solution:
        answer = f"{process}\n{solution}"  # the reasoning, then the answer in its tags
    return messages if answer is None else [*messages, Message("assistant", answer)]


def read_history(record: dict, where: str) -> list[Message]:
    pairs, messages = record.get("history") or [], []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise UserError(f"{where}: history holds {str(pair)[:80]}; expected pairs of a question and its answer")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


# -- What stands beside them


def read_text(record: dict, key: str, where: str) -> str | None:
    found = record.get(key)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{where}: {key} is a {type(found).__name__}, expected text")
    return found


def read_solution(record: dict, where: str) -> str | None:
    """Text or a number; None where there is none."""
    for key in ("solution", "answer"):
        found = record.get(key)
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, (str, int, float)):
            raise UserError(f"{where}: {key} is {str(found)[:80]}; expected text or a number")
        if str(found).strip():
            return str(found)
    return None


def read_options(record: dict, where: str) -> list[str]:
    """["A. Left", …]. Options without letters get them."""
    found = record.get("options") or []
    if isinstance(found, dict):
        found = [f"{letter}. {words}" for letter, words in found.items()]
    if not isinstance(found, list) or not all(isinstance(words, str) for words in found):
        raise UserError(f"{where}: options are {str(found)[:80]}; expected a list of texts")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if len(found) > len(letters):
        raise UserError(f"{where}: {len(found)} options, expected at most {len(letters)}")
    lettered = all(re.match(rf"\(?{letter}[.):]", words) for words, letter in zip(found, letters))
    return list(found) if lettered else [f"{letter}. {words}" for letter, words in zip(letters, found)]


def read_clips(record: dict, where: str) -> dict:
    clips = {}
    for kind in ("video", "image"):
        names = [key for key in (kind, f"{kind}s") if record.get(key) not in (None, [], "")]
        if len(names) == 2:
            raise UserError(f"{where}: found {names[0]} and {names[1]}; expected one of them")
        clips[kind] = first_of(record, *(names or (kind, f"{kind}s")))
    if record.get("problem") is not None and record.get("path"):
        kind = record.get("data_type")
        if kind not in ("video", "image"):
            raise UserError(f"{where}: data_type is {str(kind)[:40]!r}; expected video or image beside path")
        clips[kind] = record["path"]
    return clips


QUESTIONS = ("problem", "query", "question", "instruction")
ANSWERS = ("response", "output", "completion")
_BESIDE = ("video", "videos", "image", "images", "system", "solution")
FORMS = (  # of several that would do, the first counts
    Form("conversations", "LLaVA, 2U1 and LLaMA-Factory sharegpt", _BESIDE, from_conversations),
    Form("messages", "OpenAI, ms-swift and TRL messages", _BESIDE, from_messages),
    Form("conversation", "ms-swift sharegpt", _BESIDE, from_pairs),
    Form("prompt", "TRL prompt and completion", ("completion", *_BESIDE), from_prompt),
    Form("problem", "Video-R1", ("options", "problem_type", "process", "solution", "path", "data_type"), from_question),
    Form("query", "ms-swift query and response", ("response", "history", *_BESIDE), from_question),
    Form("question", "question and answer", ("answer", "options", *_BESIDE), from_question),
    Form("instruction", "Alpaca", ("input", "output", "history", *_BESIDE), from_question),
)
