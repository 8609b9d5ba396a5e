"""The report page's style sheet and Jinja template, apart from the code that fills them. Next: `page.py`."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fff; --text: #1d1b18; --soft: #5d5850; --rule: #e3dfd8;
  --base: #8d867b; --tuned: #0f7a6c; --held: #b4530a; --good: #0b6b41; --good-bg: #ddf3e6; --bad: #a4221b; --bad-bg: #fbe3e0;
  --even-bg: #ebe8e2; --code: #f1efea; --p0: #8d867b; --p1: #0f7a6c; --p2: #b4530a; --p3: #3d6fb5; --p4: #8a4fa3; --p5: #b58a12;
  --p6: #a8475c; }
@media (prefers-color-scheme: dark) { :root { --page: #161513; --card: #201e1b; --text: #ece8e1; --soft: #aaa397; --rule: #38342e;
  --base: #8f887c; --tuned: #35b8a4; --held: #ef9a4d; --good: #7fdcae; --good-bg: #14372a; --bad: #ffa69e; --bad-bg: #471f1b;
  --even-bg: #34302a; --code: #191815; --p0: #8f887c; --p1: #35b8a4; --p2: #ef9a4d; --p3: #7eabea; --p4: #c590de; --p5: #dfbd55;
  --p6: #e88fa2; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans",
  "Noto Sans Hebrew", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
h3 { font-size: 1rem; margin: 0 0 2px; }
p { margin: 0; }
.soft { color: var(--soft); font-size: .875rem; }
.headline { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; font-weight: 700; letter-spacing: -.02em; margin: 6px 0 8px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px 18px; min-width: 0; }
.chip { display: inline-block; border-radius: 99px; padding: 1px 11px; font-size: .875rem; font-weight: 600;
  background: var(--even-bg); }
.chip.good { background: var(--good-bg); color: var(--good); } .chip.bad { background: var(--bad-bg); color: var(--bad); }
.bar { margin-top: 12px; } .bar .line1 { display: flex; justify-content: space-between; gap: 10px; flex-wrap: wrap; }
.bar b { font-variant-numeric: tabular-nums; } .bar .soft { font-variant-numeric: tabular-nums; }
.track { position: relative; height: 14px; border-radius: 4px; background: var(--even-bg); margin-top: 3px; }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--base); }
.fill.tuned { background: var(--tuned); }
.span { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--text); min-width: 2px; }
.span::before, .span::after { content: ""; position: absolute; top: -4px; height: 10px; width: 2px; background: var(--text); }
.span::after { right: 0; }
.foot { margin-top: 12px; display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: baseline; }
svg { display: block; width: 100%; max-width: 640px; height: auto; }
svg text { fill: var(--soft); font: 12.5px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .dot { stroke: var(--card); stroke-width: 1.5; }
svg .train { stroke: var(--tuned); } svg circle.train { fill: var(--tuned); }
svg .faint { stroke: var(--tuned); opacity: .3; stroke-width: 1; }
svg .rate { stroke: var(--tuned); } svg circle.rate { fill: var(--tuned); }
svg .line.held { stroke: var(--held); stroke-dasharray: 5 4; } svg circle.held { fill: var(--held); }
.key { display: inline-block; width: 16px; height: 3px; border-radius: 2px; background: var(--tuned); margin: 0 6px 4px 0; }
.key.held { background: var(--held); } .legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 6px; }
.said { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 7px 10px; margin: 0; }
.said dt { color: var(--soft); font-size: .875rem; padding-top: 1px; }
.said dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.said dd.tuned { font-weight: 600; }
.said .ok { color: var(--good); font-weight: 600; }
.samples > .card + .card { margin-top: 12px; }
.facts { width: 100%; border-collapse: collapse; font-size: .9rem; }
.facts td { padding: 4px 0; vertical-align: top; }
.facts tr + tr td { border-top: 1px solid var(--rule); }
.facts td:first-child { color: var(--soft); padding-right: 14px; width: 42%; }
.facts td { overflow-wrap: anywhere; } .facts.long td:first-child { width: 64%; } .top { align-items: start; }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre { background: var(--code); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  margin: 8px 0 0; font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.hashes td:last-child { font: .8rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
svg .column.train { fill: var(--tuned); } svg .column.held { fill: var(--held); }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); margin: 20px 0 0; }
.tiles > div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 9px 14px; min-width: 0; }
.tiles dt { color: var(--soft); font-size: .8rem; } .tiles dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.stopped { border-left: 5px solid var(--bad); background: var(--bad-bg); border-radius: 8px; padding: 10px 14px; margin-top: 16px;
  overflow-wrap: anywhere; }
.words { margin-top: 10px; } .words .chip { margin-right: 6px; }
.stack { display: flex; height: 22px; border-radius: 5px; overflow: hidden; background: var(--even-bg); margin-top: 3px; }
.stack > div { min-width: 1px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.p0 { background: var(--p0); } .p1 { background: var(--p1); } .p2 { background: var(--p2); } .p3 { background: var(--p3); }
.p4 { background: var(--p4); } .p5 { background: var(--p5); } .p6 { background: var(--p6); }
.numbers { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.numbers th { text-align: right; font-weight: 600; color: var(--soft); padding: 3px 0 3px 10px; }
.numbers td { text-align: right; padding: 3px 0 3px 10px; border-top: 1px solid var(--rule); white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { text-align: left; padding-left: 0; white-space: normal;
  overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; } li { overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 520px) { main { padding: 20px 14px 40px; } .said { grid-template-columns: minmax(0, 1fr); gap: 2px; }
  .said dd { margin-bottom: 8px; } svg text { font-size: 16px; } }
@page { margin: 14mm; }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --text: #1d1b18; --soft: #5d5850; --rule: #d8d3ca;
  --base: #8d867b; --tuned: #0f7a6c; --held: #b4530a; --good: #0b6b41; --good-bg: #ddf3e6; --bad: #a4221b; --bad-bg: #fbe3e0;
  --even-bg: #ebe8e2; --code: #fff; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; } .card, .bar, .tiles { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .wide { grid-template-columns: 1fr 1fr; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""

MACROS = """{% macro bars(card) %}
{% for bar in card.bars %}
<div class="bar">
<div class="line1"><span>{{ bar.name }}</span><span><b>{{ bar.text }}</b><span class="soft">{{ bar.interval }}</span></span></div>
<div class="track"><div class="fill {{ bar.which }}" style="width:{{ bar.end }}%"></div>
{% if bar.low is not none %}
<div class="span" style="left:{{ bar.low }}%;width:{{ (bar.high - bar.low) | round(2) }}%"></div>
{% endif %}
</div>
</div>
{% endfor %}
{% if card.words is defined and card.words %}
<p class="words soft">{% if card.verdict %}<span class="chip {{ card.css }}">{{ card.mark }} {{ card.verdict }}</span>{% endif %}
{{ card.words }}</p>
{% endif %}
{% endmacro %}
{% macro pictures(charts) %}
<div class="grid wide">
{% for chart in charts %}
<section class="card">
<h3>{{ chart.heading }}</h3>
{{ chart.svg }}
<div class="legend soft">
{% for css, words in chart.legend %}
<span><span class="key {{ css }}"></span>{{ words }}</span>
{% endfor %}
</div>
</section>
{% endfor %}
</div>
{% endmacro %}
"""

PAGE = (
    MACROS
    + """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ r.headline }} · {{ r.run }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>Kivnun · run {{ r.run }} · {{ r.status }}</h1>
<p class="headline">{{ r.headline }}</p>
<p>{{ r.detail }}</p>
{% if r.stopped %}<p class="stopped">{{ r.stopped }}</p>{% endif %}
{% if r.facts.get("Training") or r.facts.get("Model") %}
<dl class="tiles">
{% for heading, name in (("Training", "steps"), ("Training", "whole run"), ("Training", "peak memory"),
                         ("Model", "trainable parameters"), ("Data", "training rows")) %}
{% if name in r.facts.get(heading, {}) %}<div><dt>{{ name }}</dt><dd>{{ r.facts[heading][name] }}</dd></div>{% endif %}
{% endfor %}
</dl>
{% endif %}
</header>

{% if cards %}
<h2>Base and tuned on held-out rows</h2>
<div class="grid">
{% for card in cards %}
<section class="card">
<h3>{{ card.label }}</h3>
<p class="soft">{{ card.meaning }}</p>
{{ bars(card) }}
</section>
{% endfor %}
</div>
<p class="soft" style="margin-top:10px">In brackets: 95 % intervals from resampling the held-out rows. “Better” and “worse”
are said only where the interval of the difference, on the same rows, excludes zero.
Replies are generated for at most <code>evaluation.generate_rows</code> of the rows.</p>
{% endif %}

{% if forgetting %}
<h2>Forgetting: text that has nothing to do with the task</h2>
<div class="grid wide top">
<section class="card">
<h3>{{ forgetting.label }}</h3>
<p class="soft">{{ forgetting.meaning }}; {{ r.forgetting.rows }} rows, {{ r.forgetting.source }}
{%- if r.forgetting.truncated %}, {{ r.forgetting.truncated }} of them cut to <code>data.max_seq_len</code>{% endif %}</p>
{{ bars(forgetting) }}
{% if r.forgetting.base is none %}<p class="words soft">The base was not scored on it, so nothing can be said.</p>{% endif %}
</section>
{% if r.forgetting.by_kind and r.forgetting.tuned is not none %}
<section class="card"><h3>By kind of text</h3><table class="numbers">
<tr><th></th><th>base</th><th>tuned</th><th>change</th></tr>
{% for kind, base, tuned in r.forgetting.by_kind %}
<tr><td>{{ kind }}</td><td>{{ loss(base) }}</td><td>{{ loss(tuned) }}</td>
<td>{% if base is not none and tuned is not none %}{{ "+" if tuned > base else "" }}{{ loss(tuned - base) }}{% endif %}</td></tr>
{% endfor %}
</table><p class="soft" style="margin-top:8px">A few rows of each kind: read these for their direction.</p></section>
{% endif %}
</div>
{% endif %}

{% if charts %}
<h2>Training</h2>
{{ pictures(charts) }}
{% endif %}

{% if r.samples %}
<h2>The same prompts, before and after</h2>
<div class="samples">
{% for sample in r.samples %}
<section class="card"><dl class="said">
<dt>prompt</dt><dd dir="auto">{{ sample.prompt }}</dd>
<dt>reference</dt><dd dir="auto">{{ sample.reference }}</dd>
{% for which, reply in (("base", sample.base), ("tuned", sample.tuned)) %}
{% if reply is not none %}
<dt>{{ which }}{% if same(reply, sample.reference) %} <span class="ok" title="equals the reference">✓</span>{% endif %}</dt>
<dd dir="auto" class="{{ which }}">{% if reply.strip() %}{{ reply }}{% else %}<span class="soft">(nothing)</span>{% endif %}</dd>
{% endif %}
{% endfor %}
</dl></section>
{% endfor %}
</div>
{% endif %}

{% if r.facts.get("Data") %}
<h2>The data</h2>
<div class="grid wide top">
<section class="card"><h3>Rows</h3><table class="facts long">
{% for name, value in r.facts["Data"].items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
{% if r.findings %}
{% for name, count in r.findings.counts.items() %}
<tr><td>{{ name }}</td><td>{% if count %}<b>{{ "{:,}".format(count) }}</b>{% else %}none{% endif %}</td></tr>
{% endfor %}
{% endif %}
</table></section>
{% if lengths %}
<section class="card">
<h3>{{ lengths.heading }}</h3>
{{ lengths.svg }}
<div class="legend soft">
{% for css, words in lengths.legend %}<span><span class="key {{ css }}"></span>{{ words }}</span>{% endfor %}
</div>
</section>
{% endif %}
</div>
{% endif %}

{% if plan %}
<h2>The plan, and what it came to</h2>
<div class="grid wide">
<section class="card"><h3>Memory at its most</h3>
{% if plan.memory %}<p class="soft">{{ plan.memory }}</p>{% endif %}
<div class="bar"><div class="line1"><span>planned</span><b>{{ plan.planned_bytes }}</b></div>
<div class="stack">{% for part in plan.parts -%}
<div class="p{{ part.colour }}" style="width:{{ part.width }}%" title="{{ part.name }}: {{ part.text }}"></div>
{%- endfor %}</div></div>
<div class="bar"><div class="line1"><span>taken</span><b>{{ plan.actual_bytes }}</b></div>
<div class="track" style="height:22px">
{%- if plan.actual_width is not none %}<div class="fill tuned" style="width:{{ plan.actual_width }}%"></div>{% endif %}</div></div>
<table class="numbers" style="margin-top:12px">
{% for part in plan.parts %}
<tr><td><span class="swatch p{{ part.colour }}"></span>{{ part.name }}</td><td>{{ part.text }}</td></tr>
{% endfor %}
</table></section>
<section class="card"><h3>Time of the whole run</h3>
{% if plan.time %}<p class="soft">{{ plan.time }}</p>{% endif %}
<div class="bar"><div class="line1"><span>planned</span><b>{{ plan.planned_time }}</b></div>
<div class="track" style="height:22px"><div class="fill base" style="width:{{ plan.planned_time_width }}%"></div></div></div>
<div class="bar"><div class="line1"><span>taken</span><b>{{ plan.actual_time }}</b></div>
<div class="track" style="height:22px">
{%- if plan.actual_time_width is not none %}<div class="fill tuned" style="width:{{ plan.actual_time_width }}%"></div>{% endif %}
</div></div>
<table class="numbers" style="margin-top:12px"><tr><td>steps</td><td>{{ plan.steps }}</td></tr></table>
</section>
</div>
{% endif %}

{% if r.notes %}
<h2>Notes</h2>
<section class="card"><ul>{% for note in r.notes %}<li>{{ note }}</li>{% endfor %}</ul></section>
{% endif %}

<h2>What was run</h2>
<div class="grid">
{% for heading, entries in r.facts.items() if heading in ("Model", "Training") %}
<section class="card"><h3>{{ heading }}</h3><table class="facts">
{% for name, value in entries.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table></section>
{% endfor %}
</div>
{% for heading, entries in r.facts.items() if heading not in ("Data", "Model", "Training") %}
<details><summary>{{ heading }}</summary><div class="card"><table class="facts hashes">
{% for name, value in entries.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table></div></details>
{% endfor %}
{% if r.given %}
<details><summary>The spec as it was given</summary><pre>{{ r.given }}</pre></details>
{% endif %}
{% if r.spec %}
<details><summary>The spec, with every default and its reason</summary><pre>{{ r.spec }}</pre></details>
{% endif %}
</main>
</body>
</html>"""
)
