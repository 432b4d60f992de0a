# SPDX-License-Identifier: Apache-2.0
"""Small chat templates with what the published ones of Qwen do, in other words."""

# Qwen2.5: a system message by default, a list of tools, calls and results as JSON.
HERMES = r"""
{%- set head = messages[0].content if messages[0]['role'] == 'system' else 'Be kind.' %}
{{- '<|im_start|>system\n' + head }}
{%- if tools %}
    {{- '\n\nTools:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- elif message.role != 'tool' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Qwen3: thinking cut off an assistant's content, left out before the last question.
THINKING = r"""
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set at = messages|length - 1 - loop.index0 %}
    {%- if ns.open and message.role == 'user' and message.content is string
           and not (message.content.startswith('<tool_response>')
                    and message.content.endswith('</tool_response>')) %}
        {%- set ns.open = false %}{%- set ns.last = at %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- elif reasoning_effort is defined %}
        {{- '<think>\n(' ~ reasoning_effort|upper ~ ')' }}
    {%- endif %}
{%- endif %}
"""

# Qwen3-Coder and later: schemas and calls as tags, contents in parts, macros.
TAGS = r"""
{%- macro more(given, known) %}
    {%- for key in given if key not in known %}
        {%- if given[key] is mapping %}
            {{- '\n<' ~ key ~ '>' }}{{- more(given[key], []) }}{{- '</' ~ key ~ '>' }}
        {%- else %}
            {{- '\n<' ~ key ~ '>' ~ (given[key] | tojson | safe) ~ '</' ~ key ~ '>' }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{%- macro shown(content) %}
    {%- if content is string %}{{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}{{- part.text }}
            {%- else %}{{- raise_exception('Unexpected part.') }}{%- endif %}
        {%- endfor %}
    {%- elif content is none or content is undefined %}{{- '' }}
    {%- else %}{{- raise_exception('Unexpected content.') }}{%- endif %}
{%- endmacro %}
{%- if tools is iterable and tools | length > 0 %}
    {{- '<|im_start|>system\n<tools>' }}
    {%- for tool in tools %}
        {%- set tool = tool.function if tool.function is defined else tool %}
        {{- '\n<function>\n<name>' ~ tool.name ~ '</name>' }}
        {%- for name, fields in tool.parameters.properties | items %}
            {{- '\n<parameter>\n<name>' ~ name ~ '</name>' }}
            {{- '\n<type>' ~ (fields.type | string) ~ '</type>' }}
            {{- more(fields, ['name', 'type']) }}
            {{- '\n</parameter>' }}
        {%- endfor %}
        {{- more(tool.parameters, ['type', 'properties']) }}
        {{- '\n</function>' }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = shown(message.content) | trim %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role in ['system', 'user', 'assistant'] %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n<function=' + call.name + '>\n' }}
            {%- for key, value in call.arguments | items %}
                {{- '<parameter=' + key + '>\n' }}
                {{- value if value is string else value | tojson | safe }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- raise_exception('Unexpected role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is not defined or enable_thinking %}{{- '<think>\n' }}
    {%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

# What a template may do besides: the tokens by name, the year, a loop that is left.
ODDS = r"""
{{ bos_token }}{{ strftime_now('%Y') }}
{%- for message in messages %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {{ message | tojson(indent=2) }} {{ message.content | tojson(ensure_ascii=true) }}
  {{ dict(message, role='x').role }} {{ message.content | upper | replace('A', '4') }}
  {{ message }} {{ message.content[2:5] }} {{ message.content | length }}
{%- endfor %}
{{ messages | map(attribute='role') | unique | sort | join(eos_token) }}
"""

ALL = {"hermes": HERMES, "thinking": THINKING, "tags": TAGS, "odds": ODDS}
