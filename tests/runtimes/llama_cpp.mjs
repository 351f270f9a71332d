// Next-token logits of GGUF models in llama.cpp, with and without LoRA adapters.
// node llama_cpp.mjs requests.json answers.json
// requests: [{model, tokens, lora: null | [{filePath, scale}]}]; answers: an array of logits, or a string that says
// what failed, for each. It lies in the folder where `npm install node-llama-cpp` was run.
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [requestsFile, answersFile] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});

async function answer({model: modelPath, tokens, lora}) {
    const model = await llama.loadModel({modelPath, gpuLayers: 0});
    // 32 bits in the cache: with 16 their rounding would be what is measured.
    const context = await model.createContext({
        contextSize: 256,
        threads: 1,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
        ...(lora ? {lora: {adapters: lora}} : {})
    });
    const input = tokens.map((token, i) => (i === tokens.length - 1 ? [token, {generateNext: {logits: true}}] : token));
    const results = await context.getSequence().controlledEvaluate(input);
    const logits = results.at(-1).next.logits;
    const row = new Array(logits.size);
    for (const [token, value] of logits) row[token] = value;
    await context.dispose();
    await model.dispose();
    return row;
}

const answers = [];
for (const request of JSON.parse(fs.readFileSync(requestsFile, "utf8")))
    answers.push(await answer(request).catch((error) => String(error)));
fs.writeFileSync(answersFile, JSON.stringify(answers));
process.exit(0);
