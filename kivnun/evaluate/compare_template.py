"""The comparison page's own style and its Jinja template; the rest of the style is the report's. Next: `compare_page.py`."""

from __future__ import annotations

from kivnun.evaluate.page_template import MACROS

STYLE = """
:root { --r0: #6f6a61; --r1: #0f7a6c; --r2: #b4530a; --r3: #3d6fb5; --r4: #8a4fa3; --r5: #a8475c; }
@media (prefers-color-scheme: dark) { :root { --r0: #a39c90; --r1: #35b8a4; --r2: #ef9a4d; --r3: #7eabea; --r4: #c590de;
  --r5: #e88fa2; } }
.fill.r0, .key.r0, .swatch.r0 { background: var(--r0); } .fill.r1, .key.r1, .swatch.r1 { background: var(--r1); }
.fill.r2, .key.r2, .swatch.r2 { background: var(--r2); } .fill.r3, .key.r3, .swatch.r3 { background: var(--r3); }
.fill.r4, .key.r4, .swatch.r4 { background: var(--r4); } .fill.r5, .key.r5, .swatch.r5 { background: var(--r5); }
svg .r0 { stroke: var(--r0); } svg .r1 { stroke: var(--r1); } svg .r2 { stroke: var(--r2); }
svg .r3 { stroke: var(--r3); } svg .r4 { stroke: var(--r4); } svg .r5 { stroke: var(--r5); }
svg circle.r0 { fill: var(--r0); } svg circle.r1 { fill: var(--r1); } svg circle.r2 { fill: var(--r2); }
svg circle.r3 { fill: var(--r3); } svg circle.r4 { fill: var(--r4); } svg circle.r5 { fill: var(--r5); }
svg circle.dot { stroke: var(--card); } svg .line.dashed { stroke-dasharray: 5 4; } .fill.dashed, .key.dashed { opacity: .6; }
.scroll { overflow-x: auto; } .runs { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
.runs th, .runs td { text-align: left; padding: 5px 16px 5px 0; vertical-align: top; overflow-wrap: anywhere; min-width: 7.5rem; }
.runs th { font-weight: 600; white-space: nowrap; } .runs tr + tr td { border-top: 1px solid var(--rule); }
.runs td:first-child { color: var(--soft); min-width: 8.5rem; }
.line1 > span:first-child { overflow-wrap: anywhere; }
@media print { :root { --r0: #6f6a61; --r1: #0f7a6c; --r2: #b4530a; --r3: #3d6fb5; --r4: #8a4fa3; --r5: #a8475c; } }
"""

PAGE = (
    MACROS
    + """{% macro card(card) %}
<section class="card">
<h3>{{ card.label }}</h3>
<p class="soft">{{ card.meaning }}</p>
{{ bars(card) }}
{% for said in card.said %}
<p class="words soft"><span class="chip {{ said.css }}">{{ said.mark }} {{ said.verdict }}</span>
<b>{{ said.run }}</b> {{ said.words }}</p>
{% endfor %}
</section>
{% endmacro %}
{% macro table(rows) %}
<section class="card scroll"><table class="runs">
<tr><th></th>{% for run in c.runs %}<th><span class="swatch {{ styles[loop.index0] }}"></span>{{ run.name }}</th>{% endfor %}</tr>
{% for name, values in rows %}
<tr><td>{{ name }}</td>{% for value in values %}<td>{{ short(value) }}</td>{% endfor %}</tr>
{% endfor %}
</table></section>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ headline }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>Kivnun · comparison of {{ c.runs | length }} runs</h1>
<p class="headline">{{ headline }}</p>
{% for sentence in sentences %}<p>{{ sentence }}.</p>{% endfor %}
<p class="soft" style="margin-top:6px">Differences are to <b>{{ c.reference }}</b>, paired: on the same held-out rows, matched by
what they hold. In brackets: 95 % intervals from resampling those rows. “Better” and “worse” are said only where the interval of
a difference excludes zero. They are about these trainings: another seed gives another model.</p>
</header>

{% if cards %}
<h2>Measures on held-out rows</h2>
<div class="grid wide top">
{% for one in cards %}{{ card(one) }}{% endfor %}
</div>
{% endif %}

{% if unrelated %}
<h2>Forgetting: text that has nothing to do with the task</h2>
<div class="grid wide top">{% for one in unrelated %}{{ card(one) }}{% endfor %}</div>
{% endif %}

<h2>What each took</h2>
{{ table(facts) }}

{% if charts %}
<h2>Training</h2>
{{ pictures(charts) }}
{% endif %}

<h2>What differs in the specs</h2>
{% if c.spec %}{{ table(c.spec.items()) }}{% else %}<p>Nothing: the specs are the same.</p>{% endif %}

{% if c.record %}
<h2>What else differs</h2>
<p class="soft" style="margin-bottom:8px">Hashes of data, base and code, versions and machine, from the manifests.</p>
{{ table(c.record.items()) }}
{% endif %}
</main>
</body>
</html>"""
)
