// What changed between two answers, word by word: the longest common subsequence of their words.

const pieces = (text) => text.match(/\S+|\s+/g) ?? [];
const isWord = (piece) => /\S/.test(piece);

// Indices into a and b of one longest common subsequence.
function common(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const rows = a.length - start - end;
  const columns = b.length - start - end;
  const width = columns + 1;
  const longest = new Uint16Array((rows + 1) * width); // longest[i][j]: of a[i..] and b[j..]
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      longest[i * width + j] = a[start + i] === b[start + j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const keptA = new Set();
  const keptB = new Set();
  const keep = (i, j) => { keptA.add(i); keptB.add(j); };
  for (let i = 0; i < start; i++) keep(i, i);
  for (let i = 0, j = 0; i < rows && j < columns;) {
    if (a[start + i] === b[start + j]) keep(start + i++, start + j++);
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  for (let i = 1; i <= end; i++) keep(a.length - i, b.length - i);
  return { keptA, keptB };
}

// Runs of {text, changed}; white space between two changed words belongs to the change.
function runs(text, kept) {
  const parts = pieces(text);
  const result = [];
  let word = 0;
  const flags = parts.map((piece) => (isWord(piece) ? !kept.has(word++) : null));
  parts.forEach((piece, i) => {
    const changed = flags[i] ?? Boolean(flags[i - 1] && flags[i + 1]);
    if (result.length && result.at(-1).changed === changed) result.at(-1).text += piece;
    else result.push({ text: piece, changed });
  });
  return result;
}

export function compare(base, adapted) {
  const words = [base, adapted].map((text) => pieces(text).filter(isWord));
  const { keptA, keptB } = common(...words);
  return {
    base: runs(base, keptA),
    adapted: runs(adapted, keptB),
    changed: words[1].length - keptB.size,
    dropped: words[0].length - keptA.size,
    total: words[1].length,
  };
}
