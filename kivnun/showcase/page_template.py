"""The showcase page's own styles and its Jinja template, apart from the code that fills them. Next: `page.py`."""

from __future__ import annotations

MORE_STYLE = """
:root { --published: #5b6fb5; --exhibit: #c2410c; --even: #b08a1e; }
@media (prefers-color-scheme: dark) { :root { --published: #8b9ee6; --exhibit: #f08a4b; --even: #d5b24c; } }
svg rect.base { fill: var(--base); } svg rect.tuned { fill: var(--tuned); } svg rect.shuffled { fill: var(--even); }
svg rect.contaminated { fill: var(--exhibit); } svg rect.published { fill: var(--published); }
svg path.span { stroke: var(--text); stroke-width: 1.5; fill: none; }
svg text.value { fill: var(--text); font-weight: 600; font-size: 12.5px; } svg text.name { font-size: 13px; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.measured > .card { display: grid; grid-template-rows: subgrid; grid-row: span 4; row-gap: 0; align-content: start; }
.card.contaminated { border-color: var(--exhibit); border-width: 2px; } .panel svg { margin: 8px 0 4px; }
.panel h3 { display: flex; gap: 8px; align-items: baseline; flex-wrap: wrap; }
.exhibit { background: var(--exhibit); color: var(--card); border-radius: 99px; padding: 1px 10px; font-size: .78rem;
font-weight: 600; }
.lines { list-style: none; padding: 0; }
.lines li { display: grid; grid-template-columns: 4.2em 1fr; gap: 1px 6px; font-size: .875rem; white-space: normal; padding: 5px
0;
  border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
.lines .chip { font-size: .78rem; padding: 0 8px; grid-column: 2; justify-self: start; }
.key.base { background: var(--base); } .key.published { background: var(--published); } .key.contaminated { background:
var(--exhibit); }
.key.tuned { background: var(--tuned); } .key.shuffled { background: var(--even); } .key { height: 10px; width: 14px;
margin-bottom: 0; }
.plain li { margin: 7px 0; white-space: normal; }
.scroll { overflow-x: auto; } .scroll table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.scroll th { text-align: right; font-weight: 600; color: var(--soft); padding: 4px 10px; vertical-align: bottom; font-size:
.82rem; }
.scroll td { text-align: right; padding: 5px 10px; border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums;
vertical-align: top; }
.scroll th:first-child, .scroll td:first-child { text-align: left; padding-left: 0; } .scroll td .soft { display: block; }
.scroll td + td { white-space: nowrap; }
.facts td { white-space: normal; } .two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.ok { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
@media (max-width: 520px) { svg text, svg text.value, svg text.name { font-size: 13px; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Before and after fine-tuning · Kivnun</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>Kivnun · before and after fine-tuning</h1>
<p class="headline">{{ headline }}</p>
<p>{{ r.base }}, {{ r.test_questions }} multiple-choice questions, {{ r.seeds }} {{ "seed" if r.seeds == 1 else "seeds" }} per
bar,
95 % intervals. {% if r.size != "full" %}This is the <b>quick</b> form: few questions and one seed, so the intervals are wide.
{% endif %}Made by <code>kivnun showcase</code>, which anybody can repeat on a laptop.</p>
</header>

<h2>What to conclude</h2>
<section class="card"><ul class="plain">{% for line in conclusions %}<li>{{ line }}</li>{% endfor %}</ul></section>

<h2>Measured here</h2>
<div class="legend soft" style="margin-bottom:10px"><span><span class="key base"></span>base</span>
<span><span class="key tuned"></span>tuned on other topics</span><span><span class="key shuffled"></span>answers shuffled</span>
<span><span class="key contaminated"></span>trained on the test</span><span>whiskers: 95 % interval, over seeds and
questions</span></div>
<div class="grid three measured">
{% for panel in panels %}
<section class="card panel {{ panel.style }}">
<h3>{{ panel.title }}{% if panel.style == "contaminated" %} <span class="exhibit">an exhibit</span>{% endif %}</h3>
<p class="soft">{{ panel.meaning }}</p>
{{ panel.svg }}
<ul class="lines">{% for measure, change, mark, verdict, css in panel.lines %}
<li><b>{{ measure }}</b><span>{{ change }}</span><span class="chip {{ css }}">{{ mark }} {{ verdict }}</span></li>{% endfor
%}</ul>
</section>
{% endfor %}
</div>

<h2>As published, for comparison</h2>
<p class="soft" style="margin-bottom:10px">Not measured here: copied from {{ source }}. TruthfulQA, per cent.
<span class="key base" style="margin-left:8px"></span>base <span class="key published" style="margin-left:8px"></span>after
fine-tuning</p>
<div class="grid three">
{% for panel in published %}
<section class="card panel"><h3>{{ panel.title }}</h3>{{ panel.svg }}</section>
{% endfor %}
</div>
<section class="card" style="margin-top:16px"><h3>What is not known about the published figures</h3>
<ul class="plain">{% for line in not_known %}<li>{{ line }}</li>{% endfor %}</ul></section>

<h2>By kind of question</h2>
<section class="card"><div class="scroll"><table>
<tr><th>kind</th><th>questions</th><th>MC1<br>base</th><th>MC1<br>tuned</th><th>MC1<br>shuffled</th><th>MC1 trained<br>on the
test</th>
<th>robust<br>base</th><th>robust<br>tuned</th></tr>
{% for kind, skill, count, cells in kinds %}
<tr><td>{{ kind }} <span class="soft" style="display:inline">{{ skill }}</span></td><td>{{ count }}</td>
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div><p class="soft" style="margin-top:8px">Per cent, over all seeds. With so few questions of a kind, ten points and
more may be chance.</p></section>

<h2>What was forgotten</h2>
<section class="card"><div class="scroll"><table>
<tr><th>not trained in any run</th><th>base</th><th>tuned</th><th>answers shuffled</th><th>trained on the test</th></tr>
{% for label, cells in forgetting %}
<tr><td>{{ label }}</td>{% for value, change in cells %}<td>{{ value }}{% if change %}<span class="soft">{{ change }}</span>{%
endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div><p class="soft" style="margin-top:8px">Below each figure its difference to the base with the 95 % interval. A loss
should not rise.</p></section>

<h2>Is the test in the training rows?</h2>
<section class="card"><table class="facts">
<tr><td>topics of the test that are trained on</td><td>{{ r.near_duplicates.topics_shared }}</td></tr>
<tr><td>test questions that stand in training as they are</td><td>{{ r.near_duplicates.equal }}</td></tr>
{% for level, count in r.near_duplicates.above.items() %}
<tr><td>with a training question of likeness {{ level }} or more</td><td>{{ count }} of {{ r.test_questions }}</td></tr>
{% endfor %}
<tr><td>the closest pair, likeness {{ "%.2f" | format(r.near_duplicates.closest.likeness) }}</td>
<td><div dir="auto">test: {{ r.near_duplicates.closest.test }}</div><div dir="auto">training: {{ r.near_duplicates.closest.train
}}</div></td></tr>
</table><p class="soft" style="margin-top:8px">Likeness: shared runs of five characters over all of both, question and best answer
together. Questions of a kind share their wording, so some likeness is the form’s. Of the run trained on the test all
{{ r.test_questions }} are equal, by its making.</p></section>

<h2>One question of each kind</h2>
<div class="grid two">
{% for one in examples %}
<section class="card"><h3>{{ one.kind }}</h3><dl class="said"><dt>question</dt><dd dir="auto">{{ one.question }}</dd><dt>best
answer</dt>
<dd dir="auto">{{ one.best }}</dd>{% for label, answer, right in one.picks %}
<dt>{{ label }}</dt><dd dir="auto">{{ answer }} <span class="{{ "ok" if right else "no" }}">{{ "✓" if right else "✗"
}}</span></dd>{% endfor %}
</dl></section>
{% endfor %}
</div>

<h2>How it is measured</h2>
<section class="card"><table class="facts">
<tr><td>MC1</td><td>share of questions whose best answer is likelier than every false one, by the sum of its tokens’
log-probabilities
(Lin et al. 2022)</td></tr>
<tr><td>MC2</td><td>probability of the true answers over that of all answers, mean over questions (Lin et al. 2022)</td></tr>
<tr><td>Robust accuracy</td><td>our definition: share of questions whose best answer is chosen among four listed options in all
four
variations, which list the options in other orders and word the question in other ways, two of them in no training row; whoever
guesses each time anew gets 0.4 %, whoever keeps to one of the options without knowing which is true gets 25 %</td></tr>
<tr><td>Topics</td><td>a hash of its name puts each day, amount, measure, territory, language and currency on one side for
ever</td></tr>
<tr><td>Tuned</td><td>{{ r.train_questions }} questions, each asked openly and with options, {{ r.epochs.tuned }} epochs of
LoRA</td></tr>
<tr><td>Answers shuffled</td><td>the same rows, each answer drawn from the question’s own true and false ones</td></tr>
<tr><td>Trained on the test</td><td>the {{ r.test_questions }} test questions as they are asked, openly and in the first of the
four
variations, {{ r.epochs.contaminated }} epochs of the same LoRA; the other three variations were not among its rows</td></tr>
<tr><td>Intervals</td><td>2,000 draws of seeds and questions with replacement, both at once; differences take the same questions
on both
sides{% if r.seeds == 1 %}; with one seed only the draw of questions counts{% endif %}</td></tr>
</table></section>

<h2>Repeat it</h2>
<section class="card"><pre>kivnun showcase --output showcase{{ " --quick" if r.size == "quick" else "" }}</pre>
<p class="soft" style="margin-top:8px">showcase.json, beside this page, holds what every model gave to every answer, so that each
bar can be computed again.</p>
<table class="facts" style="margin-top:8px">
<tr><td>date</td><td>{{ r.date }}</td></tr><tr><td>Kivnun</td><td>{{ r.kivnun }}, code {{ r.code_hash[:12] }}</td></tr>
<tr><td>time it took</td><td>{{ "%.0f" | format(r.seconds / 60) }} min{{ ", the last of several calls" if r.resumed else ""
}}</td></tr>
{% for name, value in r.environment.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table></section>
<details><summary>The spec of a run</summary><pre>{{ r.spec }}</pre></details>
</main>
</body>
</html>"""
