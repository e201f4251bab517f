"""The page's style sheet: light and dark by the reader's setting, narrow screens, paper."""

# The series colours are eight that colour-blind readers can tell apart, darkened on white and lightened on black;
# markers differ too. A table that is wider than its box throws a shadow at the edge behind which it goes on.
LIGHT = """--back:#f7f7f4;--sheet:#fff;--ink:#1b211e;--soft:#535c57;--line:#dcE0dd;--leaf:#2a7549;--pale:#cfe3d6;
--edge:#1b211e59;--s0:#535c57;--s1:#0067a5;--s2:#b84a07;--s3:#2a7549;--s4:#9a3d86;--s5:#7d6000;--s6:#a3182f;--s7:#4a4fb5"""
DARK = """--back:#121614;--sheet:#1a201d;--ink:#e6ebe8;--soft:#a3aea8;--line:#353f39;--leaf:#62b985;--pale:#2f4a3a;
--edge:#e6ebe866;--s0:#b3beb8;--s1:#5fb1ea;--s2:#f2925a;--s3:#6cc98f;--s4:#dc8fcb;--s5:#d9b84a;--s6:#f0788a;--s7:#9ea3f5"""
STYLE = (
    f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
"""
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.25rem 1rem 3rem}
header{border-bottom:3px solid var(--leaf);margin-bottom:.5rem}
h1{font-size:1.5rem;line-height:1.25;margin:.25rem 0;overflow-wrap:anywhere}
header p{margin:.25rem 0 .75rem;color:var(--soft);font-size:1.05rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.75rem 0 .5rem;overflow-wrap:anywhere}
section>p,details>p{margin:.25rem 0 .5rem;color:var(--soft);overflow-wrap:anywhere}
a{color:var(--s1)}
summary{cursor:pointer}summary{margin-top:1rem}summary h2{display:inline}
summary small,.search small{color:var(--soft)}
details>section,details>.box{margin-left:.25rem}
.box{overflow:auto;border:1px solid var(--line);border-radius:8px;background:
linear-gradient(to right,var(--sheet) 40%,transparent) left/2.5rem 100% no-repeat local,
linear-gradient(to left,var(--sheet) 40%,transparent) right/2.5rem 100% no-repeat local,
linear-gradient(to right,var(--edge),transparent) left/.7rem 100% no-repeat scroll,
linear-gradient(to left,var(--edge),transparent) right/.7rem 100% no-repeat scroll,var(--sheet)}
.box:focus-visible,button:focus-visible,input:focus-visible{outline:2px solid var(--s1);outline-offset:1px}
.long{max-height:30rem}
.long thead th{position:sticky;top:0;background:var(--sheet);box-shadow:0 1px 0 var(--line)}
table{border-collapse:collapse;width:100%}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:600;font-size:.85rem}
.text{text-align:left;overflow-wrap:break-word}td.text:last-child:not(:first-child){overflow-wrap:anywhere;min-width:5.5rem}
td.text:last-child:nth-child(n+6){min-width:14rem}.whole{white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums}td.number{white-space:nowrap}
.bars td{padding-top:.12rem;padding-bottom:.12rem;vertical-align:middle}.bars .wide{width:50%;min-width:5rem}
.layer{font-size:.85rem;overflow-wrap:anywhere;min-width:8rem}
.bar{display:block;width:100%;height:.7rem}.bar .before{fill:var(--pale)}.bar .after{fill:var(--leaf)}
figure{margin:.75rem 0 .5rem;background:var(--sheet);border:1px solid var(--line);border-radius:8px;padding:.75rem}
figcaption{color:var(--soft);font-size:.85rem;text-align:center;margin-top:.35rem}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:.75rem}
.row figure{margin:0}.row img{display:block;width:100%;height:auto}
.plot{display:block;width:100%;max-width:40rem;margin:0 auto}
.plot text{fill:var(--soft);font-size:12.5px}.plot .grid{stroke:var(--line);stroke-width:1}
.plot .rank{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--sheet);stroke-width:3px}
.plot polyline{fill:none;stroke:currentColor;stroke-width:1.8}
polyline.front{fill:none;stroke:var(--soft);stroke-width:1.4;stroke-dasharray:5 3}
.plot .span{stroke:currentColor;stroke-width:1.4}
.plot circle,.plot polygon,.mark circle,.mark polygon{fill:currentColor;stroke:var(--sheet);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.5rem 0 0;justify-content:center;font-size:.9rem}
.legend span{display:inline-flex;align-items:center;gap:.3rem;overflow-wrap:anywhere}
.mark{width:14px;height:14px;flex:none}
.search{display:flex;gap:.6rem;align-items:center;margin:.25rem 0 .5rem}
.search input{font:inherit;color:inherit;background:var(--sheet);border:1px solid var(--line);border-radius:6px;
padding:.3rem .6rem;width:min(100%,20rem)}
.command{display:flex;gap:.75rem;align-items:flex-start;background:var(--sheet);border:1px solid var(--line);
border-radius:8px;padding:.6rem .75rem}
code{font:.9rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.command code{flex:1;min-width:0;user-select:all}.command span{display:inline-block;max-width:100%}
button{font:inherit;font-size:.85rem;color:inherit;background:var(--back);border:1px solid var(--line);
border-radius:6px;padding:.2rem .7rem;cursor:pointer;flex:none}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}
.s6{color:var(--s6)}.s7{color:var(--s7)}
@media (max-width:36rem){main{padding:.75rem .6rem 2rem}th,td{padding:.3rem .3rem}body{font-size:14px}
.plot text{font-size:15px}.number{padding-left:.25rem}
.long{max-height:24rem}.bars .wide{width:34%;min-width:4rem}}
@media print{"""
    + f":root{{color-scheme:light;{LIGHT};--back:#fff;--ink:#000}}"
    + """
body{font-size:10pt}main{max-width:none;padding:0}.box{overflow:visible;border:0;background:none}.long{max-height:none}
.long thead th{position:static;box-shadow:none}
figure{break-inside:avoid;border:0}.plot{max-width:13cm}
tr{break-inside:avoid}h2{break-after:avoid}details::details-content{content-visibility:visible;display:block;height:auto}
.search,button{display:none}.command{border:0;padding:0}a{color:inherit;text-decoration:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)
