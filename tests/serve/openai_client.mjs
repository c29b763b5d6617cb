// What the official JavaScript client gets of a service: one JSON object on standard output, or an exception.
//
//     node openai_client.mjs URL MODEL CLIP.wav [KEY]
//
// Run from a directory whose node_modules has `openai`.

import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.cwd(), "package.json"));
const OpenAI = require("openai");
const [baseURL, model, recording, apiKey = "unused"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 120_000 });
const clip = fs.readFileSync(recording);
const question = [{ role: "user", content: "what is two plus three" }];
const spoken = { modalities: ["text", "audio"], audio: { voice: "alloy", format: "pcm16" } };
const heard = [
  {
    role: "user",
    content: [{ type: "input_audio", input_audio: { data: clip.toString("base64"), format: "wav" } }],
  },
];
const found = {};

async function refused(work, kind, status, code) {
  await assert.rejects(work, (error) => {
    assert(error instanceof kind, `${error.constructor.name} is no ${kind.name}`);
    assert.equal(error.status, status);
    assert.equal(error.code, code);
    return true;
  });
}

// Models.
const listed = await client.models.list();
assert.deepEqual(listed.data.map((one) => one.id), [model]);
assert.equal((await client.models.retrieve(model)).owned_by, "speechgpt");

// Chat, written and spoken, whole.
const answer = await client.chat.completions.create({ model, messages: question });
found.text = answer.choices[0].message.content;
assert(found.text.length > 0);
assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
const voiced = await client.chat.completions.create({ model, messages: heard, ...spoken });
const { audio } = voiced.choices[0].message;
assert(audio.id && audio.transcript && audio.expires_at > Date.now() / 1000);
found.sound = Buffer.from(audio.data, "base64").length;
assert(found.sound > 1000);
const again = [...heard, { role: "assistant", audio: { id: audio.id } }, { role: "user", content: "and now" }];
assert((await client.chat.completions.create({ model, messages: again })).choices[0].message.content);

// The same as streams: events, and the helper that puts them together.
let text = "";
const stream = await client.chat.completions.create({
  model, messages: question, stream: true, stream_options: { include_usage: true },
});
let last;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  last = chunk;
}
assert.equal(text, found.text);
assert.deepEqual(last.usage, answer.usage);
const gathered = client.chat.completions.stream({ model, messages: question });
assert.equal(await gathered.finalContent(), found.text);
let pieces = 0;
let transcript = "";
for await (const chunk of await client.chat.completions.create({ model, messages: heard, stream: true, ...spoken })) {
  const part = chunk.choices[0]?.delta?.audio;
  pieces += part?.data ? 1 : 0;
  transcript += part?.transcript ?? "";
}
assert(pieces > 0);
assert.equal(transcript, audio.transcript);
found.pieces = pieces;

// Speech: a file, bytes while they are made, events.
const speech = { model, voice: "alloy", input: "two plus three is five" };
const file = Buffer.from(await (await client.audio.speech.create({ ...speech, response_format: "wav" })).arrayBuffer());
assert.equal(file.subarray(0, 4).toString(), "RIFF");
const live = await client.audio.speech.create({ ...speech, response_format: "pcm" });
assert.equal(live.headers.get("content-type"), "audio/pcm;rate=24000");
let bytes = 0;
for await (const piece of live.body) bytes += piece.length;
assert(bytes > 1000);
const events = await (await client.audio.speech.create({ ...speech, response_format: "pcm", stream_format: "sse" })).text();
assert(events.includes("speech.audio.delta") && events.includes("speech.audio.done"));

// Transcriptions: whole, with its length, as subtitles, as a stream.
const written = await client.audio.transcriptions.create({ model, file: fs.createReadStream(recording) });
assert(written.text);
const long = { model, file: fs.createReadStream(recording), response_format: "verbose_json" };
assert.equal((await client.audio.transcriptions.create(long)).duration, 1);
const subtitles = { model, file: fs.createReadStream(recording), response_format: "srt" };
assert((await client.audio.transcriptions.create(subtitles)).includes("-->"));
let done;
for await (const event of await client.audio.transcriptions.create({
  model, file: fs.createReadStream(recording), stream: true,
})) done = event;
assert.deepEqual([done.type, done.text], ["transcript.text.done", written.text]);

// Errors are the client's own classes.
const body = { model, messages: question };
await refused(client.chat.completions.create({ ...body, model: "gpt-4o" }), OpenAI.NotFoundError, 404, "model_not_found");
await refused(client.chat.completions.create({ ...body, n: 2 }), OpenAI.BadRequestError, 400, "unsupported_parameter");
await refused(client.chat.completions.create({ ...body, messages: [] }), OpenAI.BadRequestError, 400, "invalid_value");
const noise = await OpenAI.toFile(Buffer.from("no sound at all"), "a.wav");
await refused(
  client.audio.transcriptions.create({ model, file: noise }), OpenAI.BadRequestError, 400, "audio_unreadable",
);
const big = await OpenAI.toFile(Buffer.alloc(3_000_000), "a.wav");
await refused(client.audio.transcriptions.create({ model, file: big }), OpenAI.APIError, 413, "request_too_large");

// A stream that is given up.
const controller = new AbortController();
const given = await client.chat.completions.create({ ...body, stream: true }, { signal: controller.signal });
for await (const _ of given) controller.abort();

process.stdout.write(JSON.stringify(found));
