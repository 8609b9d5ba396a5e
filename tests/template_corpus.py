"""Chat templates in the style of the known families, and small tokenizers of the known kinds, made on the spot.

Each family says what its template is expected to train for one reply: `reply(content)` then `marker`. This is written by hand
per family, so that tests compare the masks with something that does not come from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


def as_is(content: str) -> str:
    return content


@dataclass(frozen=True)
class Family:
    """A template and what it trains. `per_turn`: earlier turns change when later ones follow, so one row per reply."""

    name: str
    source: str
    marker: str
    reply: Callable[[str], str] = as_is
    system: bool = True
    tools: bool = False
    per_turn: bool = False
    eos: str = "</s>"
    bos: str = "<s>"
    prompt_extended: bool = False
    """The template knows no generation prompt, or prompts otherwise than it renders: prompts are not transformers' own."""


PLAIN = Family(
    "plain",
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "<|end|>",
    eos="<|endoftext|>",
)

FAMILIES = (
    PLAIN,
    Family(
        "phi_3",
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        eos="<|endoftext|>",
    ),
    Family(
        "phi_3_5",
        """{% for m in messages %}
{% if m['role'] == 'system' and m['content'] %}{{ '<|system|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'assistant' %}{{ '<|assistant|>\\n' + m['content'] + '<|end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
        "<|end|>",
        eos="<|endoftext|>",
    ),
    Family(
        "phi_4",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|im_end|>",
        eos="<|endoftext|>",
    ),
    Family(
        "phi_4_mini",
        """{%- set given = tools | tojson if tools else '' -%}
{%- for m in messages -%}
{%- if m.role == 'system' and given -%}
{{- '<|system|>' + m.content + '<|tool|>' + given + '<|/tool|><|end|>' -}}
{%- elif m.tool_calls -%}
{{- '<|assistant|><|tool_call|>' + (m.tool_calls | tojson) + '<|/tool_call|><|end|>' -}}
{%- else -%}
{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- else -%}{{- eos_token -}}{%- endif -%}""",
        "<|end|>",
        tools=True,
        eos="<|endoftext|>",
    ),
    Family(
        "llama_2",
        """{%- set lead = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set lead = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + ((lead if loop.first else '') + m.content).strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}""",
        "</s>",
        reply=lambda content: f" {content.strip()} ",
    ),
    Family(
        "llama_3",
        """{%- for m in messages -%}
{%- set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -%}
{{ bos_token + text if loop.first else text }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}""",
        "<|eot_id|>",
        reply=str.strip,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    Family(
        "llama_3_dated",
        """{{- bos_token }}{%- set date = strftime_now('%d %b %Y') %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Today Date: ' + date + '\n\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- set messages = messages[1:] %}{%- endif %}
{%- if tools %}{%- for tool in tools %}{{- '\n' + tool | tojson(indent=4) }}{%- endfor %}{%- endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson }}{{- '<|eom_id|>' }}
{%- else %}{{- m.content | trim }}{{- '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
        "<|eot_id|>",
        reply=str.strip,
        tools=True,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    Family(
        "chatml",
        """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}""",
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    Family(
        "chatml_with_tags",
        """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    Family(
        "qwen_2",
        """{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}{{- 'You are helpful.' }}{%- endif %}
{{- '\n\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls %}{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
        "<|im_end|>",
        tools=True,
        eos="<|im_end|>",
    ),
    Family(
        "qwen_3",
        """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
        "<|im_end|>",
        reply=lambda content: f"<think>\n\n</think>\n\n{content}",
        per_turn=True,
        eos="<|im_end|>",
    ),
    Family(
        "gemma",
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
        "<end_of_turn>",
        reply=str.strip,
        system=False,
        bos="<bos>",
        eos="<eos>",
    ),
    Family(
        "gemma_3",
        """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{%- if m.content is string -%}{{ m.content | trim }}
{%- else -%}{%- for part in m.content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}""",
        "<end_of_turn>",
        reply=str.strip,
        bos="<bos>",
        eos="<eos>",
    ),
    Family(
        "mistral",
        """{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{{ m['content'] + eos_token }}{% endif %}
{% endfor %}""",
        "</s>",
        system=False,
    ),
    Family(
        "mistral_control",
        """{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- else %}{{- m.content + eos_token }}{%- endif %}
{%- endfor %}""",
        "</s>",
    ),
    Family(
        "zephyr",
        "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
    ),
    Family(
        "vicuna",
        """{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content + ' ' }}
{%- elif m.role == 'user' -%}{{ 'USER: ' + m.content + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}""",
        "</s>",
        reply=lambda content: f" {content}",
    ),
    Family(
        "vicuna_without_prompt",
        "{% for m in messages %}{{ 'ASSISTANT: ' + m.content + eos_token if m.role == 'assistant' "
        "else m.role | upper + ': ' + m.content + '\n' }}{% endfor %}",
        "</s>",
        reply=lambda content: f" {content}",
        prompt_extended=True,
    ),
    Family(
        "alpaca",
        """{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content + '\n\n' }}
{%- elif m.role == 'user' -%}{{ '### Instruction:\n' + m.content + '\n\n' }}
{%- else -%}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}""",
        "</s>",
    ),
    Family(
        "alpaca_eos_at_the_end",
        """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '### Response:\n' + m.content + '\n\n' }}
{%- else -%}{{ '### Instruction:\n' + m.content + '\n\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- else -%}{{ eos_token }}{%- endif -%}""",
        "</s>",
        reply=lambda content: f"{content}\n\n",
        per_turn=True,
    ),
    Family(
        "no_marker",
        "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "</s>",
        reply=lambda content: f" {content}",
        per_turn=True,
    ),
    Family(
        "words_before_eos",
        "{% for m in messages %}{{ '## ' + m.role + '\n' + m.content + '\n## stop' + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '## assistant\n' }}{% endif %}",
        "</s>",
        reply=lambda content: f"{content}\n## stop",
    ),
    Family(
        "command_r",
        """{{ bos_token }}{% for m in messages %}
{% set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}
{{ '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}""",
        "<|END_OF_TURN_TOKEN|>",
        reply=str.strip,
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    Family(
        "deepseek",
        """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- else %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}""",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    Family(
        "deepseek_thinking",
        """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}""",
        "<｜end▁of▁sentence｜>",
        per_turn=True,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        prompt_extended=True,
    ),
    Family(
        "harmony",
        """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}""",
        "<|return|>",
        reply=lambda content: f"<|channel|>final<|message|>{content}",
        per_turn=True,
        eos="<|return|>",
    ),
    Family(
        "granite",
        """{%- if messages[0].role != 'system' -%}
{{ '<|start_of_role|>system<|end_of_role|>You help.<|end_of_text|>\n' }}{%- endif -%}
{%- for m in messages -%}
{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}""",
        "<|end_of_text|>",
        eos="<|end_of_text|>",
    ),
    Family(
        "tulu",
        """{% for m in messages %}
{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}
{%- else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{% endfor %}""",
        "<|endoftext|>",
        eos="<|endoftext|>",
    ),
    Family(
        "openchat",
        "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + "
        "'<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
        "<|end_of_turn|>",
        reply=lambda content: f" {content}",
        eos="<|end_of_turn|>",
    ),
    Family(
        "falcon",
        """{%- for m in messages -%}{{ '\n\n' if not loop.first }}
{%- if m.role == 'system' -%}{{ m.content }}{%- elif m.role == 'user' -%}{{ 'User: ' + m.content }}
{%- else -%}{{ 'Falcon: ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n\nFalcon:' }}{%- endif -%}""",
        "<|endoftext|>",
        reply=lambda content: f" {content}",
        eos="<|endoftext|>",
    ),
    Family(
        "exaone",
        "{% for m in messages %}{{ '[|' + m.role + '|]' + m.content + ('\n' if m.role == 'user' else '[|endofturn|]\n') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        "[|endofturn|]",
        eos="[|endofturn|]",
    ),
    Family(
        "internlm",
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    Family(
        "space_before_marker",
        "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' <|end|> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "<|end|>",
        reply=lambda content: f" {content} ",
    ),
    Family(
        "macros_and_loops",
        """{%- macro turn(role, text) -%}{{ '<|' + role + '|>\n' + text + '<|end|>\n' }}{%- endmacro -%}
{%- set ns = namespace(count=0) -%}
{%- for m in messages -%}
{%- if m.role not in ['system', 'user', 'assistant'] -%}{%- continue -%}{%- endif -%}
{%- set ns.count = ns.count + 1 -%}
{{ turn(m.role, m.content) }}
{%- if ns.count > 1000 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}""",
        "<|end|>",
        eos="<|endoftext|>",
    ),
    Family(
        "json_content",
        "{% for m in messages %}{{ dict(role=m.role) | tojson + '<|im_sep|>' + m.content | tojson + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ dict(role='assistant') | tojson + '<|im_sep|>' }}{% endif %}",
        "<|im_end|>",
        reply=lambda content: json.dumps(content, ensure_ascii=False),
        eos="<|im_end|>",
    ),
    Family(
        "prompt_without_a_flag",
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if messages[-1].role == 'user' %}{{ '<|assistant|>' }}{% endif %}",
        "<|end|>",
        eos="<|endoftext|>",
    ),
    Family(
        "right_trimmed",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.rstrip() + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        reply=str.rstrip,
        eos="<|im_end|>",
    ),
    Family(
        "two_markers",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    Family(
        "history_in_short",
        """{%- for m in messages -%}
{%- if not loop.last and m.role == 'assistant' -%}{{ '<|assistant|>...<|end|>' }}
{%- else -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}""",
        "<|end|>",
        per_turn=True,
        eos="<|endoftext|>",
    ),
)

# Tokens that only data or tool calls show, and the tokens of all families.
SPECIALS = (
    "<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>",
    "<|tool_call|>", "<|/tool_call|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start|>",
    "<|channel|>", "<|message|>", "<|return|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|end_of_turn|>",
    "[|endofturn|]", "<pad>",
)  # fmt: skip

_TEXT = (
    "hello world, how are you? the reply is here.\n\n",
    "[INST] hi [/INST] the reply [INST] more [/INST] yes ",
    "USER: hello ASSISTANT: the answer is 42. USER: and now? ASSISTANT: the end",
    "### Instruction:\nsay it\n\n### Response:\nthe reply\n\n",
    "assistant\nthe\nuser\n hello\n\n  two spaces\n   three\n\n\nlines ",
    "שלום עולם, מה שלומך? תשובה: כן. ",
    "system You are helpful. Assistant: the User: hi Falcon: 12 345",
)


def _bytes_tokenizer(*, use_regex: bool, strip: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    tokenizer.add_special_tokens([_special(text, strip) for text in SPECIALS])
    return tokenizer


def _special(text: str, strip: bool) -> AddedToken:
    """With `strip`, tokens swallow spaces as Phi-3's do: after them, and for ends of turns also before."""
    ends = text in {"<|end|>", "<|im_end|>", "<|eot_id|>"}
    plain = not strip or text in {"<s>", "<unk>", "<bos>"}
    return AddedToken(text, rstrip=not plain, lstrip=ends and not plain, normalized=False, special=True)


def _spaces_tokenizer(*, prepend_normalizer: bool, strip: bool) -> Tokenizer:
    """SentencePiece's manner: spaces are "▁", unknown characters are bytes. With the normalizer, as older Llamas and Phi-3."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *alphabet], show_progress=False, max_token_length=8)
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.train_from_iterator([text.replace("\n", "") for text in _TEXT * 4], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if prepend_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([_special(text, strip) for text in SPECIALS])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: _bytes_tokenizer(use_regex=True, strip=False),
    "bytes_any_merge": lambda: _bytes_tokenizer(use_regex=False, strip=False),
    "bytes_strip": lambda: _bytes_tokenizer(use_regex=True, strip=True),
    "spaces": lambda: _spaces_tokenizer(prepend_normalizer=False, strip=False),
    "spaces_prepend": lambda: _spaces_tokenizer(prepend_normalizer=True, strip=False),
    "spaces_prepend_strip": lambda: _spaces_tokenizer(prepend_normalizer=True, strip=True),
}


def write_base(folder: Path, tokenizer: Tokenizer, family: Family) -> Path:
    """Write what a base's folder holds of a tokenizer, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.eos,
        "pad_token": family.eos,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(family.source, encoding="utf-8")
    return folder
