"""The page's style sheet: light and dark by the reader's setting, narrow screens, paper."""

# The series colours are eight that colour-blind readers can tell apart, darkened on white and lightened on black;
# markers differ too.
STYLE = """
:root{--back:#fbfaf8;--sheet:#fff;--ink:#1d2320;--soft:#5d6661;--line:#dfe3e0;--leaf:#2f7d4f;--pale:#d5e7db;
--s0:#5d6661;--s1:#0067a5;--s2:#c2500a;--s3:#2f7d4f;--s4:#9a3d86;--s5:#8a6a00;--s6:#a3182f;--s7:#4a4fb5}
@media (prefers-color-scheme:dark){:root{--back:#141816;--sheet:#1b211e;--ink:#e6ebe8;--soft:#9aa59f;--line:#333c37;
--leaf:#62b985;--pale:#2b4436;--s0:#a9b4ae;--s1:#5fb1ea;--s2:#f2925a;--s3:#6cc98f;--s4:#dc8fcb;--s5:#d9b84a;--s6:#f0788a;
--s7:#9ea3f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.25rem 1rem 3rem}
header{border-bottom:3px solid var(--leaf);margin-bottom:.5rem}
h1{font-size:1.5rem;line-height:1.25;margin:.25rem 0;overflow-wrap:anywhere}
header p{margin:.25rem 0 .75rem;color:var(--soft);font-size:1.05rem}
h2{font-size:1.1rem;margin:1.75rem 0 .5rem}
summary{cursor:pointer}summary h2{display:inline-block;margin-bottom:.25rem;overflow-wrap:anywhere}
summary small{color:var(--soft)}
.box{overflow-x:auto;background:var(--sheet);border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:600;font-size:.85rem}
.text{text-align:left;overflow-wrap:break-word}td.text:last-child:not(:first-child){overflow-wrap:anywhere;min-width:5.5rem}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.widths td{padding-top:.12rem;padding-bottom:.12rem;vertical-align:middle}.widths .wide{width:55%;min-width:5rem}
.layer{font-size:.85rem;overflow-wrap:anywhere;min-width:9rem}
.bar{display:block;width:100%;height:.7rem}.bar .before{fill:var(--pale)}.bar .after{fill:var(--leaf)}
figure{margin:0;background:var(--sheet);border:1px solid var(--line);border-radius:8px;padding:.75rem}
.plot{display:block;width:100%;max-width:36rem;margin:0 auto}
.plot text{fill:var(--soft);font-size:12.5px}.plot .grid{stroke:var(--line);stroke-width:1}
.plot polyline{fill:none;stroke:currentColor;stroke-width:1.8}
.plot circle,.plot polygon,.mark circle,.mark polygon{fill:currentColor;stroke:var(--sheet);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.5rem 0 0;justify-content:center;font-size:.9rem}
.legend span{display:inline-flex;align-items:center;gap:.3rem}.mark{width:14px;height:14px}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}
.s6{color:var(--s6)}.s7{color:var(--s7)}
@media (max-width:36rem){main{padding:.75rem .6rem 2rem}th,td{padding:.3rem .45rem}body{font-size:14px}
.plot text{font-size:15px}}
@media (max-width:66rem){.number{white-space:normal}}
@media print{:root{--back:#fff;--sheet:#fff;--ink:#000;--soft:#444;--line:#bbb;--leaf:#2f7d4f;--pale:#cfe3d6;
--s0:#5d6661;--s1:#0067a5;--s2:#c2500a;--s3:#2f7d4f;--s4:#9a3d86;--s5:#8a6a00;--s6:#a3182f;--s7:#4a4fb5}
body{font-size:10pt}main{max-width:none;padding:0}.box{overflow:visible;border:0}figure{break-inside:avoid;border:0}
tr{break-inside:avoid}h2{break-after:avoid}details::details-content{content-visibility:visible;display:block;height:auto}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
