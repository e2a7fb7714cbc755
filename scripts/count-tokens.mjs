// Counts the tokens of the texts in tests/golden/tokens.json with the vocabularies of several families of models, and writes
// the counts into the file. Run by hand, when texts are added:
//   npm install --prefix /tmp/vocabularies gpt-tokenizer llama-tokenizer-js llama3-tokenizer-js node-llama-cpp
//   node scripts/count-tokens.mjs /tmp/vocabularies tests/golden/tokens.json gemma3=MODEL.gguf
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [folder, file, model] = process.argv.slice(2);
const from = createRequire(path.resolve(folder, "package.json"));
const load = async (name) => (await import(from.resolve(name))).default;
const plain = { allowedSpecial: new Set(), disallowedSpecial: new Set() };
const llama2 = await load("llama-tokenizer-js");
const llama3 = await load("llama3-tokenizer-js");
const vocabularies = {
  cl100k: (text) => from("gpt-tokenizer/cjs/encoding/cl100k_base").encode(text, plain).length,
  o200k: (text) => from("gpt-tokenizer/cjs/encoding/o200k_base").encode(text, plain).length,
  llama2: (text) => llama2.encode(text, false, true).length,
  llama3: (text) => llama3.encode(text, { bos: false, eos: false }).length,
};
if (model) {
  const [name, file] = model.split("=");
  const { getLlama } = await import(from.resolve("node-llama-cpp"));
  const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
  const loaded = await llama.loadModel({ modelPath: path.resolve(file), vocabOnly: true });
  vocabularies[name] = (text) => loaded.tokenize(text, false).length;
}
const texts = JSON.parse(fs.readFileSync(file, "utf8"));
for (const one of texts) {
  one.counts = Object.fromEntries(Object.entries(vocabularies).map(([name, count]) => [name, count(one.text)]));
}
fs.writeFileSync(file, JSON.stringify(texts, null, 1) + "\n");
process.exit(0);
