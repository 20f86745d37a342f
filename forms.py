"""A record in any of the forms of other trainers -> its messages, and what stands beside them. Imports no torch.

The forms, and the documents that they were read from:

    conversations  LLaVA, 2U1 (its README, Dataset Preparation; for GRPO without tags), LLaMA-Factory sharegpt (its
                   data/README.md): from/value or role/content; `video`, `image` or `videos`, `images`, `system`
    messages       OpenAI (developers.openai.com, guides/vision-fine-tuning) and vLLM: parts, weight 0 = not learned
                   ms-swift (its docs/source_en/Customization/Custom-dataset.md): tags, loss false = not learned
                   TRL (its docs/source/dataset_formats.md): parts {"type": "image"} stand for entries of `images`
                   LLaMA-Factory v1: parts with `value`, `loss_weight`
    conversation   ms-swift sharegpt: [{"human": …, "assistant": …}], `system`
    prompt         TRL: messages or text, with `completion`, which alone is learned, or `solution` for GRPO
    problem        Video-R1 (its src/r1-v/src/open_r1/sft_video.py, without the wording of its prompt): `options`,
                   `problem_type`, `process`, `solution`, `path`, `data_type`
    query          ms-swift query and response; question: question and answer; instruction: Alpaca

`solution` or `answer` is what the rewards judge by, and what is learned where there is no other answer.
"""

import math
import re
from typing import NamedTuple

from model import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES["developer"] = "system"  # OpenAI's newer word
ANSWERS = ("response", "output", "completion")
# Columns that change what a record means and that nothing here reads: where they hold something, the record is refused
UNREAD = ("tools", "audio", "audios", "objects", "chat_template_kwargs")
UNREAD += ("rejected", "rejected_response", "rejected_messages", "rejected_images")


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str | list  # text, with tags in a user's turn; or typed parts
    trained: bool = True  # of the assistant: whether it is learned


class Conversation(NamedTuple):
    """A record, whatever its form was."""

    messages: list[Message]
    clips: dict  # "video", "image" -> what the record names beside its messages: a name, a list of them, or None
    solution: str | None  # where it stands apart from the messages
    options: list[str]  # lettered, "A. Left"; [] where they are not apart from the question
    problem_type: str  # as Video-R1 has it; "" where there is none


def read_form(record: dict, where: str) -> Conversation:
    """What a record says. UserError, beginning with `where`, for no known form, and for what is not learned here."""
    try:
        return conversation_of(record)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def conversation_of(record: dict) -> Conversation:
    forms = [key for key in FORMS if record.get(key) is not None]
    if not forms:
        names = " ".join(", ".join(map(str, record)).split())[:200] or "none"  # a key may hold line breaks
        raise UserError(f"no known form of record, its keys are: {names}; expected one of {', '.join(FORMS)}")
    if len(chats := [key for key in forms if key in ("conversations", "messages", "conversation")]) > 1:
        raise UserError(f"found {' and '.join(chats)}; expected one of them")
    if record.get("chosen") is not None:
        raise UserError("a preference (chosen, rejected); expected one answer: keep the chosen one as completion")
    for key in UNREAD:
        if record.get(key) not in (None, "", [], {}, "[]"):
            raise UserError(f"holds {key}, which nothing here reads; remove it, or leave the record out")
    for key in ("label", "kto_tag"):
        if str(record.get(key)).lower() in ("false", "0", "0.0"):
            raise UserError(f"{key} is {record[key]}: a rejected answer; leave it out, or rename the column")
    if not is_learned(record, "loss_weight", "loss_scale"):
        raise UserError("its loss_weight or loss_scale is 0: nothing of it is learned; leave the record out")
    messages, options, solution = FORMS[forms[0]](record, forms[0]), read_options(record), read_solution(record)
    if solution is not None and messages[-1].role != "assistant":
        messages.append(Message("assistant", solution))
    system = read_text(record, "system")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    elif system and messages[0].content != system:
        raise UserError("a system column beside another system turn; expected one of them")
    return Conversation(messages, read_clips(record), solution, options, read_text(record, "problem_type") or "")


def read_chat(record: dict, form: str) -> list[Message]:
    return message_list(form, record[form])


def read_pairs(record: dict, form: str) -> list[Message]:
    """ms-swift sharegpt."""
    pairs, chat = record[form], []
    for pair in pairs if isinstance(pairs, list) else []:
        says = pair.items() if isinstance(pair, dict) else []
        chat += [{"role": role, "content": text} for role, text in says if text is not None]
    return message_list(form, chat)


def read_prompt(record: dict, form: str) -> list[Message]:
    """TRL. Only the completion is learned, as with its completion_only_loss; the answers of the prompt are history."""
    messages = message_list(form, record[form], "user", trained=False)
    completion = record.get("completion")
    return messages if completion is None else messages + message_list("completion", completion, "assistant")


def read_question(record: dict, form: str) -> list[Message]:
    """Video-R1, query and response, Alpaca: one question, with its options, and at most one answer."""
    question = "\n".join(filter(None, (read_text(record, form), read_text(record, "input"))))
    if options := read_options(record):
        question = "\n".join([question.rstrip("\n"), "Options:", *options])
    answer = next((text for key in ANSWERS if (text := read_text(record, key))), None)
    process, solution = read_text(record, "process"), read_solution(record)
    if answer is None and process and solution:
        answer = f"{process}\n{solution}"  # the reasoning, then the answer in its tags
    messages = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"history holds {str(pair)[:80]}; expected pairs of a question and its answer")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return [*messages, Message("user", question), *([] if answer is None else [Message("assistant", answer)])]


def message_list(name: str, value, role: str = "", trained: bool = True) -> list[Message]:
    """Messages as a list of objects; or, where there is a role for it, a text of that role."""
    if role and isinstance(value, str):
        return [Message(role, value, trained)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} is {str(value)[:80]!r}; expected a list of turns")
    return [read_message(message, trained) for message in value]


def read_message(message, trained: bool) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"a turn is a {type(message).__name__}, expected an object")
    role, content = first_of(message, "from", "role"), first_of(message, "value", "content")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"unknown role {str(role)[:40]!r}; expected human/user, gpt/assistant or system")
    for key in ("tool_calls", "thinking", "reasoning_content"):
        if message.get(key):
            raise UserError(f"a turn holds {key}, which is not learned here; put it into the content, or leave it out")
    if not isinstance(content, (str, list)):
        raise UserError(f"the {role}'s turn holds {str(content)[:80]}; expected text or a list of parts")
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and not is_learned(part, "loss", "weight", "loss_weight"):
            raise UserError("a part of a turn is marked as not learned; a turn is learned whole or not at all")
    # of ms-swift, OpenAI, LLaMA-Factory v1, axolotl
    trained = is_learned(message, "loss", "weight", "loss_weight", "loss_scale", "train") and trained
    return Message(ROLES[role], content, trained)


def is_learned(item: dict, *keys: str) -> bool:
    """Whether none of these weights is 0. UserError for one between 0 and 1, or any other."""
    weights = {key: item[key] for key in keys if item.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise UserError(f"{key} is {str(weight)[:40]}; expected 0 or 1: an answer is learned whole or not at all")
    return 0 not in weights.values()


def first_of(record: dict, *keys: str):
    """The first value that is there: exports write null for what a record lacks."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def read_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} is a {type(value).__name__}, expected text")
    return value


def is_number(value) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def read_solution(record: dict) -> str | None:
    """Text or a number; None where there is none."""
    for key in ("solution", "answer"):
        value = record.get(key)
        if not (value is None or isinstance(value, str) or is_number(value)):
            raise UserError(f"{key} is {str(value)[:80]}; expected text or a finite number")
        if value is not None and str(value).strip():
            return str(value)
    return None


def read_options(record: dict) -> list[str]:
    """["A. Left", …]. Options without letters get them."""
    options, letters = record.get("options") or [], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if isinstance(options, dict):  # exports write null for an option that a question lacks
        options = {letter: words for letter, words in options.items() if words is not None}
    texts = list(options.values()) if isinstance(options, dict) else options
    is_list = isinstance(texts, list) and all(isinstance(words, str) or is_number(words) for words in texts)
    if not is_list or len(texts) > len(letters):
        raise UserError(f"options are {str(options)[:80]}; expected a list of at most {len(letters)} texts")
    if isinstance(options, dict):
        options = [f"{letter}. {words}" for letter, words in options.items()]
    options = list(map(str, options))
    lettered = all(re.match(rf"\(?{letter}[.):]", words) for words, letter in zip(options, letters))
    return options if lettered else [f"{letter}. {words}" for letter, words in zip(letters, options)]


def read_clips(record: dict) -> dict:
    clips = {}
    for kind in ("video", "image"):
        names = [key for key in (kind, f"{kind}s") if record.get(key) not in (None, [], "")]
        if len(names) == 2:
            raise UserError(f"found {names[0]} and {names[1]}; expected one of them")
        clips[kind] = first_of(record, *(names or (kind, f"{kind}s")))
    kind = record.get("data_type")
    if record.get("path") and not any(clips.values()) and (kind or record.get("problem") is not None):
        if kind not in ("video", "image"):
            raise UserError(f"data_type is {str(kind)[:40]!r}; expected video or image beside path")
        clips[kind] = record["path"]
    return clips


FORMS = {  # the key that tells a form, and what reads it; of several that would do, the first counts
    "conversations": read_chat,
    "messages": read_chat,
    "conversation": read_pairs,
    "prompt": read_prompt,
    "problem": read_question,
    "query": read_question,
    "question": read_question,
    "instruction": read_question,
}
KNOWN_COLUMNS = {*FORMS, *ANSWERS, "id", "problem_id", "video", "videos", "image", "images", "system", "solution"}
KNOWN_COLUMNS |= {"answer", "options", "problem_type", "process", "data_type", "input", "history"}
