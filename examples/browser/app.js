// SPDX-License-Identifier: Apache-2.0
// The page's forms. What they compute is in models.js.

let models;

/** An element of that name with these children, texts or elements. */
function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

/** Cells whose shade says how high their number is, `share` of 0 to 1. */
function shaded(name, text, share) {
  const cell = element(name, text);
  cell.style.setProperty("--share", Math.max(0, share));
  return cell;
}

function guessList(guesses) {
  const rows = guesses.map(({ token, score }) => {
    const percent = `${(100 * score).toFixed(1)} %`;
    return element("tr", element("th", token), shaded("td", percent, score / guesses[0].score));
  });
  return element("table", ...rows);
}

function cosineTable(embeddings) {
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const cosines = embeddings.map((a) => embeddings.map((b) => dot(a, b)));
  const lowest = Math.min(...cosines.flat());
  const head = element("tr", element("th"), ...cosines.map((_, i) => element("th", `${i + 1}`)));
  const rows = cosines.map((row, i) => {
    const cells = row.map((x) => shaded("td", x.toFixed(3), (x - lowest) / (1 - lowest || 1)));
    return element("tr", element("th", `${i + 1}`), ...cells);
  });
  return element("table", head, ...rows);
}

/** Runs `compute(dtype, onProgress)` when the form is sent, and shows its element or its error. */
function connect(id, compute) {
  const form = document.getElementById(id);
  const [button, progress, output] = ["button", "progress", "output"].map((x) =>
    form.querySelector(x),
  );
  output.replaceChildren();
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    progress.hidden = false;
    output.className = "";
    output.replaceChildren("Loading the model");
    try {
      const dtype = document.getElementById("dtype").value;
      output.replaceChildren(await compute(dtype, (percent) => (progress.value = percent)));
    } catch (error) {
      console.error(error);
      output.className = "error";
      output.replaceChildren(error.message);
    }
    progress.hidden = true;
    button.disabled = false;
  });
}

async function importModels() {
  try {
    return (models ??= await import("./models.js"));
  } catch (error) {
    const command = "cd examples && npm install --ignore-scripts --no-package-lock";
    throw new Error(`transformers.js is not installed: ${command}`, { cause: error });
  }
}

connect("fill", async (dtype, onProgress) => {
  const { fill } = await importModels();
  return guessList(await fill(document.getElementById("masked").value, dtype, onProgress));
});

connect("compare", async (dtype, onProgress) => {
  const lines = document.getElementById("sentences").value.split("\n");
  const sentences = lines.map((x) => x.trim()).filter(Boolean);
  if (sentences.length < 2) {
    throw new Error("Write at least two sentences, each on a line of its own.");
  }
  const { embed } = await importModels();
  return cosineTable(await embed(sentences, dtype, onProgress));
});
