// Calls OpenAI's routes with OpenAI's own client:  node openai.mjs BASE_URL "a text" "another"
// Prints {"model", "floats": [[...], [...]], "default": [[...], [...]], "models": [...], "image", "refused"} as JSON.

import OpenAI from "openai";

const [baseURL, ...input] = process.argv.slice(2);
if (!baseURL || input.length === 0) {
  console.error('usage: node openai.mjs BASE_URL "a text" ["another" ...]');
  process.exit(2);
}

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const [{ id: model }] = (await client.models.list()).data;

async function vectors(options) {
  const { data } = await client.embeddings.create({ model, input, ...options });
  return data.map((one) => Array.from(one.embedding));
}

const drawn = await client.images.generate({ model, prompt: input[0], n: 1 });
const refused = await client.embeddings.create({ model: "no such model", input }).catch((error) => error);

console.log(
  JSON.stringify({
    model,
    floats: await vectors({ encoding_format: "float" }),
    // Left out, the client asks for base64 and reads it.
    default: await vectors({}),
    image: drawn.data[0].b64_json,
    refused: { kind: refused.constructor.name, status: refused.status, code: refused.code },
  }),
);
