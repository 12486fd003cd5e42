"""Writes chat.json and chat-tokenizer.json: conversations as Hugging Face transformers writes them by the chat templates
that models come with, for the tests of examples/finetune.

    pip install torch transformers trl --extra-index-url https://download.pytorch.org/whl/cpu
    python tests/golden/chat.py out/smollm2

The folder is what tools/smollm2.sh makes: SmolLM2's template is from there. The others are files of the package trl
(trl/chat_templates, Apache 2.0): those that Llama 3 and Qwen 2.5 come with, and its own of the same models, which mark
answers by `{% generation %}`.

A template has `template`, `special` (tokens by their names) and `cases`. A case has what is asked (`messages`, `tools`,
`kwargs`, `answer`: whether an answer is to come) and what transformers makes of it: `text`, or `error` where the
template refuses; `ids`, by the tokenizer; and `answers`, 1 for a token of an answer and 0 for others, where the template
marks them.
"""

import json
import sys
from pathlib import Path

import trl
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CONTROL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|endoftext|>",
           "<|im_start|>", "<|im_end|>"]
LLAMA = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
QWEN = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
SMOLLM = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|im_end|>")

SHORT = [dict(role="user", content="  What is 2 + 2? "), dict(role="assistant", content="4.\n")]
LONG = [
    dict(role="system", content="You are terse.\n"),
    dict(role="user", content="Grüße an 東京! <b>\"quoted\"</b>"),
    dict(role="assistant", content="Hello. \n\nIt's 'fine' & well."),
    dict(role="user", content=""),
    dict(role="assistant", content="Yes: {\"a\": [1, 2.5, null]}"),
]
CALL = [
    dict(role="user", content="Weather in Oslo?"),
    dict(role="assistant", content=None, tool_calls=[dict(type="function", function=dict(
        name="weather", arguments=dict(place="Oslo <N>", days=2, small=1e-7, large=1e16, half=0.5, none=None, on=True)))]),
    dict(role="tool", name="weather", content="{\"degrees\": -3}"),
    dict(role="assistant", content="-3 degrees."),
]
TOOLS = [dict(type="function", function=dict(
    name="weather", description="The weather \"now\" é", parameters=dict(
        type="object", properties=dict(place=dict(type="string"), days=dict(type="integer", default=1)),
        required=["place"])))]
DATE = dict(date_string="26 Jul 2024")
PLAIN = [dict(messages=SHORT, answer=True), dict(messages=LONG), dict(messages=SHORT[:1], answer=True)]
CALLS = [dict(messages=CALL, tools=TOOLS), dict(messages=CALL[:3], tools=TOOLS, answer=True), dict(messages=CALL)]
WITH_DATE = [dict(case, kwargs=DATE) for case in PLAIN + CALLS]
WITH_DATE += [dict(messages=LONG[:2], tools=TOOLS, kwargs=DATE | dict(tools_in_user_message=False))]
# Two calls at once, which Llama 3.2 refuses.
WITH_DATE += [dict(messages=[CALL[0], CALL[1] | dict(tool_calls=CALL[1]["tool_calls"] * 2)], kwargs=DATE)]

CASES = {
    "llama3": (LLAMA, PLAIN),
    "llama3_training": (LLAMA, PLAIN),
    "llama3_2": (LLAMA, WITH_DATE),
    "qwen2_5": (QWEN, PLAIN + CALLS),
    "qwen2_5_training": (QWEN, PLAIN + CALLS),
    "smollm2": (SMOLLM, PLAIN),
}


def make_tokenizer():
    """A byte-level BPE of a few tokens, with those that the templates write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([json.dumps(LONG + CALL + TOOLS)], trainer)
    tokenizer.save(str(HERE / "chat-tokenizer.json"), pretty=False)
    return tokenizer


def main():
    tokenizer = make_tokenizer()
    smollm2 = json.loads((Path(sys.argv[1]) / "tokenizer_config.json").read_text())["chat_template"]
    written = {}
    for name, (special, cases) in CASES.items():
        template = smollm2 if name == "smollm2" else (TEMPLATES / f"{name}.jinja").read_text()
        theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
        made = []
        for case in cases:
            case = dict(tools=None, kwargs={}, answer=False) | case
            marks = "generation %}" in template
            asked = dict(tools=case["tools"], add_generation_prompt=case["answer"], **case["kwargs"])
            try:
                case["text"] = theirs.apply_chat_template(case["messages"], tokenize=False, **asked)
                out = theirs.apply_chat_template(
                    case["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=marks, **asked)
                case["ids"] = " ".join(map(str, out["input_ids"]))
                if marks:
                    case["answers"] = "".join(map(str, out["assistant_masks"]))
            except TemplateError as error:
                case["error"] = str(error)
            made.append(case)
        written[name] = dict(template=template, special=special, cases=made)
    (HERE / "chat.json").write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
