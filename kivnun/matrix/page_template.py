"""The matrix page's own style and Jinja template; the rest of the style is the report's. Next: `page.py`."""

from __future__ import annotations

STYLE = """
main { max-width: 1280px; }
.scroll { overflow-x: auto; }
table.matrix { border-collapse: separate; border-spacing: 6px; width: 100%; min-width: 940px; table-layout: fixed; }
table.matrix th { text-align: left; font-weight: 600; font-size: .9rem; vertical-align: bottom; padding: 2px 4px; }
table.matrix th:first-child { width: 150px; vertical-align: top; padding-top: 10px; }
table.matrix td { background: var(--card); border: 1px solid var(--rule); border-top-width: 4px; border-radius: 8px;
  padding: 8px 10px; vertical-align: top; font-size: .84rem; line-height: 1.4; }
table.matrix td.supported { border-top-color: var(--good); } table.matrix td.contradicted { border-top-color: var(--bad); }
table.matrix td.no_detectable_effect { border-top-color: var(--base); }
table.matrix td.not_applicable { border-top-color: var(--rule); }
td .what { font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
td .says { color: var(--soft); font-size: .78rem; margin-top: 4px; }
.word { font-weight: 600; font-size: .78rem; } .supported .word { color: var(--good); } .contradicted .word { color: var(--bad); }
.no_detectable_effect .word, .not_applicable .word { color: var(--soft); }
table.plain { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
table.plain th, table.plain td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
table.plain th:first-child, table.plain td:first-child { text-align: left; }
table.plain tr.first td { font-weight: 600; }
.lead { max-width: 74ch; margin-bottom: 10px; } .lead + .lead { margin-top: 8px; }
.key2 { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 12px; vertical-align: -1px; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Nine scenarios by six techniques, measured</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>Kivnun · matrix · {{ m.scale }} · {{ m.date }}</h1>
<p class="headline">Which technique helps with what, measured</p>
<p class="lead">A document about tuning Phi models answers this question with a table of nine scenarios by six techniques, a Yes or
a No in each cell. Here each cell is a measurement on the base <code>{{ m.base }}</code>
({{ "{:,}".format(m.base_parameters) }} parameters) that anyone can repeat: <code>{{ m.command }}</code>.</p>
<p class="lead soft">{{ m.machine }}</p>
</header>

<h2>How to choose</h2>
<section class="card"><ul>{% for line in advice %}<li>{{ line }}</li>{% endfor %}</ul></section>

<h2>The table</h2>
<p class="soft"><span class="key2" style="background:var(--good);margin-left:0"></span>supported: {{ counts.supported }}
<span class="key2" style="background:var(--bad)"></span>contradicted: {{ counts.contradicted }}
<span class="key2" style="background:var(--base)"></span>no detectable effect: {{ counts.no_detectable_effect }}
<span class="key2" style="background:var(--rule)"></span>not applicable: {{ counts.not_applicable }}</p>
<div class="scroll">
<table class="matrix">
<tr><th></th>{% for technique in techniques %}<th>{{ technique }}</th>{% endfor %}</tr>
{% for number, title in rows.items() %}
<tr><th>{{ number }}. {{ title }}</th>
{% for technique in techniques %}{% set cell = cells[(number, technique)] %}
<td class="{{ cell.css }}"><div class="what">{{ cell.what }}</div><div class="soft">{{ cell.more }}</div>
<div class="word">{{ cell.word }}</div>
<div class="says">document: {{ cell.document }}
{%- if cell.upstream != cell.document %} · its authors later: {{ cell.upstream }}{% endif %}</div></td>
{% endfor %}</tr>
{% endfor %}
</table>
</div>
<p class="soft" style="margin-top:10px">{{ rule }}</p>

<h2>Scores</h2>
<p class="soft lead">Held-out topics; the mean over {{ m.seeds }} seed{{ "" if m.seeds == 1 else "s" }},
{{ "each method at the rate that did best on rows held back from training" if m.sweep else "one usual learning rate each" }}.
In brackets: 95 % interval of the difference to the base, rows and seeds resampled together.</p>
<div class="grid wide">
{% for task in tasks %}
<section class="card"><h3>{{ task.title }}</h3><p class="soft">{{ task.metric }}, {{ task.direction }}</p>
<div class="scroll"><table class="plain"><tr><th>method</th><th>score</th><th>to the base</th><th>trained</th></tr>
{% for line in task.lines %}<tr{% if line.first %} class="first"{% endif %}><td>{{ line.method }}</td><td>{{ line.score }}</td>
<td>{{ line.gain }}</td><td>{{ line.trained }}</td></tr>{% endfor %}
</table></div></section>
{% endfor %}
</div>

{% for section in sections %}
<h2>{{ section.title }}</h2>
<p class="soft lead">{{ section.text }}</p>
<div class="grid wide">
{% for chart in section.charts %}<section class="card"><h3>{{ chart.heading }}</h3>{{ chart.svg }}</section>{% endfor %}
{% for table in section.tables %}<section class="card"><h3>{{ table.heading }}</h3><div class="scroll"><table class="plain">
<tr>{% for name in table.names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in table.lines %}<tr>{% for value in line %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}
</table></div></section>{% endfor %}
</div>
{% endfor %}

<h2>What this does not say</h2>
<section class="card"><ul>{% for line in limits %}<li>{{ line }}</li>{% endfor %}</ul></section>
</main>
</body>
</html>"""
