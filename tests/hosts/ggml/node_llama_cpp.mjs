// node-llama-cpp with its defaults: node node_llama_cpp.mjs MODEL PROMPT_FILE TOKENS GENERATED
//
// But with one thread: its threads spin where they wait for each other, which takes twenty times as long on a
// machine that does other things too.
import fs from "fs";
import {getLlama} from "node-llama-cpp";
const [file, text, count, wanted] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 4096, threads: 1});
const prompt = model.tokenize(fs.readFileSync(text, "utf8")).slice(0, +count);
const start = performance.now();
let first;
const made = [];
for await (const token of context.getSequence().evaluate(prompt, {temperature: 0})) {
  first ??= performance.now();
  made.push(token);
  if (made.length >= +wanted) break;
}
console.log(JSON.stringify({text: model.detokenize(made), prompt_s: (first - start) / 1000}));
process.exit(0);
