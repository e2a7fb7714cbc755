// The official OpenAI client for Node.js against a node, unmodified: node suite.mjs BASE_URL FOLDER_OF_THE_PACKAGE
//
// The instances are those of suite.py. Ends with `ok` and exit status 0, or
// with a stack trace.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [baseURL, folder] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/package.json`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const LOOK = {
  type: "function",
  function: {
    name: "look",
    description: "Looks at the thermometer.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const say = (model, content, more = {}, options = {}) =>
  client.chat.completions.create({ model, messages: [{ role: "user", content }], ...more }, options);

async function answers() {
  const answer = await say("echo", "hello");
  assert.equal(answer.choices[0].message.content, "hello");
  assert.deepEqual([answer.choices[0].finish_reason, answer.model, answer.object], ["stop", "echo", "chat.completion"]);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.ok(answer._request_id, "x-request-id is told");
}

async function streams() {
  const words = [];
  let [finish, usage] = [null, null];
  for await (const chunk of await say("slow", "count", { stream: true, stream_options: { include_usage: true } })) {
    const [choice] = chunk.choices;
    if (choice?.delta.content) words.push(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  assert.ok(words.join("") === "one two three four" && words.length > 1, words);
  assert.deepEqual([finish, usage.completion_tokens], ["stop", 4]);
  // The helper that puts a stream together.
  const final = await client.chat.completions.stream({ model: "slow", messages: [{ role: "user", content: "count" }] }).finalContent();
  assert.equal(final, "one two three four");
}

async function tools() {
  const messages = [{ role: "user", content: "how warm is it?" }];
  const { choices: [choice] } = await client.chat.completions.create({ model: "weather", messages, tools: [LOOK] });
  const [call] = choice.message.tool_calls;
  assert.deepEqual([choice.finish_reason, call.function.name, call.function.arguments], ["tool_calls", "look", '{"city":"Oslo"}']);
  messages.push(choice.message, { role: "tool", tool_call_id: call.id, content: "21 degrees" });
  const answer = await client.chat.completions.create({ model: "weather", messages, tools: [LOOK] });
  assert.equal(answer.choices[0].message.content, "It is mild.");
  assert.equal(answer.usage.prompt_tokens, 100);
}

async function models() {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  for (const name of ["echo", "slow", "weather"]) assert.ok(names.includes(name), `${name} in ${names}`);
  assert.equal((await client.models.retrieve("echo")).owned_by, "default");
}

async function vectors() {
  const { data } = await client.embeddings.create({ model: "lexical", input: ["the lamp in the hall", "a boat"] });
  const plain = await client.embeddings.create({ model: "lexical", input: "a boat", encoding_format: "float" });
  assert.deepEqual([data.length, data[1].embedding.length], [2, 256]);
  data[1].embedding.forEach((number, at) => assert.ok(Math.abs(number - plain.data[0].embedding[at]) < 1e-6));
}

async function refusals() {
  const refused = (kind, code, act) => assert.rejects(act, (error) => error instanceof kind && error.code === code && !!error.requestID);
  await refused(OpenAI.BadRequestError, "id_invalid", () => say("no such name", "x"));
  await refused(OpenAI.BadRequestError, "invalid", () => say("echo", "x", { n: 2 }));
  await refused(OpenAI.NotFoundError, "instance_not_found", () => client.models.retrieve("nobody"));
  await refused(OpenAI.UnprocessableEntityError, "dead_letter", () => say("poor", "x"));
}

async function repeats() {
  const once = { headers: { "Idempotency-Key": "once-in-node" } };
  const first = await say("echo", "first", {}, once);
  const second = await say("echo", "second", {}, once);
  assert.deepEqual([first.id, second.id, second.choices[0].message.content], ["chatcmpl-once-in-node", "chatcmpl-once-in-node", "first"]);
}

for (const part of [answers, streams, tools, models, vectors, refusals, repeats]) await part();
console.log("ok");
