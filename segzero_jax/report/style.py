"""The style sheet of the page, without external files, fonts or colours; for light, dark, narrow and print."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1f1e1b; --soft: #6b6860; --rule: #e4e1d8; --faint: #f1eee6;
  --c0: #1f5fb0; --c1: #c2570c; --c2: #4c6b3c; --good: #2d6a3f; --bad: #a63a2b;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1c1f23; --ink: #e9e6df; --soft: #9b978d; --rule: #30343a; --faint: #23272c;
    --c0: #7db3f5; --c1: #f0a35e; --c2: #a3c48f; --good: #86c79a; --bad: #ee9384;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans);
  font-variant-numeric: tabular-nums lining-nums; }
main, header, footer { max-width: 1168px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 72px; }
footer { padding-top: 72px; padding-bottom: 72px; color: var(--soft); font-size: 14px; }
h1 { font: 400 46px/1.1 var(--serif); letter-spacing: -0.01em; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font: 400 29px/1.2 var(--serif); margin: 0 0 10px; }
h3 { font: 600 15px/1.4 var(--sans); margin: 0; }
section { margin-top: 80px; }
p { margin: 0 0 12px; max-width: 44em; }
.lead { font: 400 19px/1.55 var(--serif); color: var(--soft); }
.note { color: var(--soft); font-size: 14px; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: 3px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 22px; margin-top: 22px; font-size: 14px; color: var(--soft); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(232px, 1fr)); gap: 28px; margin-top: 44px; }
.tile { border-top: 2px solid var(--ink); padding-top: 12px; }
.tile .what { font-size: 14px; color: var(--soft); }
.tile .value { font: 400 31px/1.35 var(--serif); white-space: nowrap; }
.tile .value .before { color: var(--soft); }
.tile .more { font-size: 14px; color: var(--soft); line-height: 1.5; }
.up { color: var(--good); } .down { color: var(--bad); }

.gains { margin-top: 26px; }
.gain { display: grid; grid-template-columns: 15em 1fr 15.5em; gap: 6px 24px; align-items: center; padding: 7px 0;
  border-top: 1px solid var(--rule); font-size: 14px; }
.gain .of { overflow-wrap: anywhere; }
.gain .mode { color: var(--soft); }
.gain.scale { border-top: 0; color: var(--soft); }
.gain .numbers { text-align: right; white-space: nowrap; }
.track { position: relative; height: 30px; }
.track i { position: absolute; display: block; }
.track .span { height: 6px; }
.track .span.old { top: 8px; border-top: 1px solid var(--soft); }
.track .span.new { top: 19px; border-top: 3px solid var(--c0); height: 3px; margin-top: 1px; }
.track .dot { width: 11px; height: 11px; border-radius: 50%; margin-left: -5.5px; }
.track .dot.old { top: 3px; background: var(--paper); border: 2px solid var(--soft); }
.track .dot.new { top: 16px; background: var(--c0); }
.track b { position: absolute; transform: translateX(-50%); font-weight: 400; font-size: 12px; }

.config { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 16px 28px;
  margin: 36px 0 18px; }
.config div { border-top: 1px solid var(--rule); padding-top: 7px; }
.config dt { font-size: 13px; color: var(--soft); } .config dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 14px; color: var(--soft); }
pre { font: 13px/1.55 var(--mono); background: var(--faint); padding: 18px 20px; overflow-x: auto; border-radius: 4px; }

figure { margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 34px 32px;
  margin-top: 28px; }
.hero { margin-top: 24px; } .hero .narrow { display: none; }
.chart-head { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; }
.chart-head h3 { min-width: 0; overflow-wrap: anywhere; }
.chart-head .now { font-size: 14px; color: var(--soft); white-space: nowrap; }
figcaption { font-size: 13px; line-height: 1.5; color: var(--soft); margin-top: 4px; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-family: var(--sans); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .max { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
svg .tick { fill: var(--soft); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { fill: none; stroke-width: 1; opacity: 0.38; stroke-linejoin: round; background: none; }
svg .band { stroke: none; opacity: 0.13; }
svg .line.s0, svg .faint.s0 { stroke: var(--c0); } svg .band.s0, svg .point.s0, svg .name.s0 { fill: var(--c0); }
svg .line.s1, svg .faint.s1 { stroke: var(--c1); } svg .band.s1, svg .point.s1, svg .name.s1 { fill: var(--c1); }
svg .line.s1 { stroke-dasharray: 6 4; }
svg .line.s2, svg .faint.s2 { stroke: var(--c2); } svg .band.s2, svg .point.s2, svg .name.s2 { fill: var(--c2); }
svg .line.s2 { stroke-dasharray: 1 5; }
svg .layer { fill: color-mix(in srgb, var(--c0) var(--part), var(--paper)); stroke: var(--paper); stroke-width: 1; }
.l0 { --part: 100%; } .l1 { --part: 80%; } .l2 { --part: 62%; } .l3 { --part: 46%; } .l4 { --part: 31%; }
.l5 { --part: 19%; } .l6, .l7, .l8, .l9 { --part: 10%; }
svg .span { fill: var(--bad); }
svg .at rect { fill: transparent; }
svg .at line, svg .at text, svg .at circle { opacity: 0; pointer-events: none; }
svg .at line { stroke: var(--soft); stroke-width: 1; }
svg .at text { fill: var(--ink); white-space: pre; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg .at:hover line { opacity: 0.5; } svg .at:hover text, svg .at:hover circle { opacity: 1; }

.shares { display: flex; height: 30px; margin: 22px 0 18px; gap: 2px; }
.shares i, .swatch { background: color-mix(in srgb, var(--c0) var(--part), var(--paper)); }
.shares i { overflow: hidden; white-space: nowrap; font-style: normal; font-size: 13px; line-height: 30px;
  padding-left: 0; text-indent: 9px; }
.shares .l0, .shares .l1, .shares .l2 { color: var(--paper); }
.shares .beside, .swatch.beside { background:
    repeating-linear-gradient(45deg, var(--soft) 0 1.5px, var(--paper) 1.5px var(--gap)); color: var(--ink); }
.shares .beside, .swatch.beside { border: 1px solid var(--soft); }
.shares .beside { text-shadow: 0 0 4px var(--paper), 0 0 4px var(--paper); }
.b0 { --gap: 3px; } .b1 { --gap: 4.5px; } .b2 { --gap: 6.5px; } .b3 { --gap: 9px; } .b4 { --gap: 12px; }
.b5 { --gap: 2.2px; }
.swatch { display: inline-block; width: 13px; height: 13px; border-radius: 2px; vertical-align: -1px;
  margin-right: 9px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 6px 0 6px 26px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th.text, td.text { text-align: left;
  } th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 400; color: var(--soft); border-bottom: 1px solid var(--ink); }
td { border-bottom: 1px solid var(--rule); }
td .range { color: var(--soft); }
.two table { width: 100%; } .two figure + figure { margin-top: 30px; }
.two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 40px; align-items: start; }

.events { margin: 18px 0 0; font-size: 14px; } .events div { border-top: 1px solid var(--rule); padding: 7px 0;
  display: grid; grid-template-columns: 12em 1fr; gap: 4px 20px; }
.events dt { color: var(--soft); } .events dd { margin: 0; } .events dd span { color: var(--soft); }

.legend { display: flex; flex-wrap: wrap; gap: 6px 28px; font-size: 14px; color: var(--soft); margin: 18px 0 0;
  align-items: center; }
.legend span { display: inline-flex; align-items: center; gap: 9px; }
.legend svg { width: 30px; height: 18px; flex: none; }
.case { border-top: 2px solid var(--ink); margin-top: 52px; padding-top: 14px; }
.case > .kind { font-size: 14px; color: var(--soft); overflow-wrap: anywhere; }
.case > .question { font: 400 22px/1.35 var(--serif); margin: 2px 0 20px; max-width: 36em; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 40px; }
.side { display: grid; grid-template-columns: minmax(0, 250px) minmax(0, 1fr); gap: 22px; align-items: start; }
.side img, .response img { display: block; width: 100%; height: auto; border-radius: 3px; }
.missing { border: 1px dashed var(--soft); border-radius: 3px; padding: 30px 14px; font-size: 13px;
  color: var(--soft); overflow-wrap: anywhere; }
.when { font-size: 14px; color: var(--soft); }
.score { font: 400 25px/1.3 var(--serif); margin-bottom: 8px; }
.score small { font: 14px var(--sans); color: var(--soft); }
.parts { display: grid; grid-template-columns: 1fr auto; gap: 1px 14px; font-size: 13px; margin: 0 0 14px; }
.parts dt { color: var(--soft); overflow-wrap: anywhere; } .parts dd { margin: 0; text-align: right; }
.parts small { color: var(--soft); font-size: inherit; }
.thought { font: 400 16px/1.5 var(--serif); margin: 0 0 10px; overflow-wrap: anywhere; white-space: pre-wrap; }
.answer { font: 12.5px/1.5 var(--mono); color: var(--soft); overflow-wrap: anywhere; margin: 0; white-space: pre-wrap; }
.responses { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 36px 30px;
  margin-top: 26px; }
.response .score { margin: 10px 0 0; }
.lean { position: relative; height: 8px; background: var(--faint); margin: 4px 0 12px; }
.lean::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; width: 1px;
  background: var(--soft); }
.lean i { position: absolute; top: 0; bottom: 0; background: var(--c0); }
.lean i.minus { background: none; border: 1.5px solid var(--c1); }

@media (max-width: 1080px) { .side { grid-template-columns: minmax(0, 1fr); } .side img { max-width: 380px; } }
@media (max-width: 760px) {
  main, header, footer { padding-left: 20px; padding-right: 20px; }
  header { padding-top: 40px; } section { margin-top: 60px; } h1 { font-size: 36px; } h2 { font-size: 25px; }
  .tiles { gap: 24px; margin-top: 32px; }
  .sides, .two { grid-template-columns: minmax(0, 1fr); gap: 32px; }
  .hero .wide { display: none; } .hero .narrow { display: block; }
  .gain { grid-template-columns: 1fr auto; } .gain .track { grid-column: 1 / -1; grid-row: 2; }
  .gain.scale > :not(.track) { display: none; }
  .config { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media print { nav { display: none; } .case, .response, figure { break-inside: avoid; } }
"""
