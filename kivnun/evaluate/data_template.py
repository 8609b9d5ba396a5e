"""The data page's own style and Jinja template; the rest of the style is the run report's. Next: `data_page.py`."""

from __future__ import annotations

STYLE = """
.numbers { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 158px), 1fr)); margin: 20px 0 0; }
.numbers > div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 9px 14px; min-width: 0; }
.numbers dt { color: var(--soft); font-size: .8rem; } .numbers dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.numbers .look { border-left: 4px solid var(--held); } .numbers .wrong { border-left: 4px solid var(--bad); }
.steps { display: grid; grid-template-columns: minmax(4.5rem, max-content) minmax(0, 1fr) max-content; gap: 6px 12px;
  align-items: center; margin: 8px 0 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.steps .name { overflow-wrap: anywhere; max-width: 20rem; } .steps .count { text-align: right; }
.rows { display: grid; gap: 2px; } .rows span { display: block; height: 9px; border-radius: 3px; background: var(--tuned); }
.rows span.held { background: var(--held); height: 6px; }
.places { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
.places th { text-align: left; color: var(--soft); font-weight: 600; font-size: .8rem; padding: 4px 10px 4px 0; }
.places td { padding: 4px 10px 4px 0; vertical-align: top; overflow-wrap: anywhere; border-top: 1px solid var(--rule); }
.places td:first-child { min-width: 6.5rem; }
.places td:last-child, .places th:last-child { padding-right: 0; text-align: right; white-space: nowrap; }
.places.said-last td:last-child, .places.said-last th:last-child { text-align: left; white-space: normal; }
.top { align-items: start; }
.counts td + td, .counts th + th { text-align: right; }
.counts tr:first-child td { border-top: 0; } .counts thead + tbody tr:first-child td { border-top: 1px solid var(--rule); }
.more { max-height: 26rem; overflow: auto; }
@media print { .more { max-height: none; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ headline }} · {{ c.train.path }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>Kivnun · data · {{ c.train.path }}{% if c.held_out %} · held out: {{ c.held_out.path }}{% endif %}</h1>
<p class="headline">{{ headline }}</p>
<p>{{ detail }}</p>
</header>

<dl class="numbers">
{% for tile in tiles %}
<div{% if tile.css %} class="{{ tile.css }}"{% endif %}><dt>{{ tile.name }}</dt><dd>{{ tile.value }}</dd></div>
{% endfor %}
</dl>

{% if reasons %}
<h2>Rows that cannot be used</h2>
<section class="card">
<table class="places said-last"><thead><tr><th>rows</th><th>why</th></tr></thead><tbody>
{% for reason, count in reasons %}
<tr><td>{{ "{:,}".format(count) }}</td><td>{{ reason }}</td></tr>
{% endfor %}
</tbody></table>
<details open><summary>{{ "{:,}".format(c.problems | length) }} problems with their places</summary>
<div class="more"><table class="places said-last"><thead><tr><th>row</th><th>what is wrong</th></tr></thead><tbody>
{% for problem in c.problems %}
<tr><td>{{ problem.path }}:{{ problem.line }}</td><td>{{ problem.message }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% if left_out %}<p class="soft">{{ left_out }}</p>{% endif %}
</section>
{% endif %}

<div class="grid wide">
{% for chart in charts %}
<section>
<h2>{{ chart.heading }}</h2>
<div class="card">
<p class="soft">{{ chart.text }}</p>
<div class="steps">
{% for bar in chart.bars %}
<span class="name"><bdi>{{ bar.name }}</bdi></span>
<span class="rows"><span style="width:{{ bar.train }}%"></span>
{% if c.held_out %}<span class="held" style="width:{{ bar.held }}%"></span>{% endif %}</span>
<span class="count">{{ bar.text }}</span>
{% endfor %}
</div>
{% if c.held_out %}
<div class="legend soft"><span><span class="key"></span>training</span>
<span><span class="key held"></span>held-out, drawn to a scale of its own</span></div>
{% endif %}
</div>
</section>
{% endfor %}
<section>
<h2>What the rows hold</h2>
<div class="card"><table class="places counts">
{% if c.held_out %}<thead><tr><th></th><th>training</th><th>held-out</th></tr></thead>{% endif %}
<tbody>
{% for name, values in facts %}
<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>
</div>

{% if repeats %}
<h2>Rows that repeat</h2>
<div class="grid wide top">
{% for kind in repeats %}
<section class="card">
<h3>{{ kind.heading }}</h3>
<p class="soft">{{ kind.text }}</p>
<div class="more"><table class="places"><thead><tr><th>row</th><th>is like</th><th>likeness</th></tr></thead><tbody>
{% for pair in kind.pairs %}
<tr><td>{{ pair.row }}</td><td>{{ pair.other }}</td><td>{{ "%.3f" | format(pair.likeness) }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
{% endfor %}
</div>
{% endif %}

{% if samples %}
<h2>The first rows</h2>
<div class="samples">
{% for sample in samples %}
<section class="card"><p class="soft">{{ sample.where }}</p><dl class="said">
{% for role, text in sample.parts %}
<dt>{{ role }}</dt><dd dir="auto">{% if text.strip() %}{{ text }}{% else %}<span class="soft">(nothing)</span>{% endif %}</dd>
{% endfor %}
</dl></section>
{% endfor %}
</div>
{% endif %}

{% if c.notes %}
<h2>Notes</h2>
<section class="card"><ul>{% for note in c.notes %}<li>{{ note }}</li>{% endfor %}</ul></section>
{% endif %}
</main>
</body>
</html>"""
