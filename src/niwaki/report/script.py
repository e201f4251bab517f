"""The page's own script: a search field above long tables and a button that copies the command. Works offline."""

import base64
import hashlib

SCRIPT = """
for (const box of document.querySelectorAll('[data-search]')) {
  const field = document.createElement('input');
  const count = document.createElement('small');
  const rows = [...box.querySelectorAll('tbody tr')];
  const texts = rows.map(row => row.textContent.toLowerCase());
  field.type = 'search';
  field.placeholder = 'Search ' + box.dataset.search;
  field.setAttribute('aria-label', field.placeholder);
  const sift = () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      row.hidden = !words.every(word => texts[number].includes(word));
      shown += row.hidden ? 0 : 1;
    });
    count.textContent = words.length ? shown + ' of ' + rows.length : '';
  };
  field.addEventListener('input', sift);
  const line = document.createElement('p');
  line.className = 'search';
  line.append(field, count);
  box.before(line);
}
for (const block of document.querySelectorAll('.command')) {
  const button = document.createElement('button');
  const code = block.querySelector('code');
  button.type = 'button';
  button.textContent = 'Copy';
  button.addEventListener('click', async () => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch (refused) {
      document.execCommand('copy');
    }
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
  block.append(button);
}
"""

HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""What the page's policy lets run: this script and no other, whatever a file may have smuggled in."""
