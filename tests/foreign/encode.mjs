// Encodes an image and a text with nothing but protos/:  node encode.mjs HOST:PORT IMAGE "a text"
// Prints {"bundle", "shape", "embeddings": [[...], [...]], "norms", "features", "streamed": [...], "refused"} as JSON.

import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [target, imagePath, text] = process.argv.slice(2);
if (!target || !imagePath || text === undefined) {
  console.error('usage: node encode.mjs HOST:PORT IMAGE "a text"');
  process.exit(2);
}

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = await protoLoader.load("monofacet/v1/feature_service.proto", {
  includeDirs: [protos],
  keepCase: true,
  longs: Number,
  enums: String,
  oneofs: true,
});
const { FeatureService } = grpc.loadPackageDefinition(definition).monofacet.v1;
const client = new FeatureService(target, grpc.credentials.createInsecure());
const deadline = () => ({ deadline: new Date(Date.now() + 60_000) });

// `dictionary` is set and empty: the bundle's default dictionary.
const options = { dictionary: "" };
const inputs = [{ image: { data: await readFile(imagePath) } }, { text }];

function floats(tensor) {
  if (tensor.dtype !== "DATA_TYPE_FLOAT32") throw new Error(`unexpected ${tensor.dtype}`);
  const bytes = Uint8Array.from(tensor.data);
  return Array.from(new Float32Array(bytes.buffer));
}

function encode(request) {
  return new Promise((resolve, reject) => {
    client.Encode(request, deadline(), (error, response) => (error ? reject(error) : resolve(response)));
  });
}

async function streamEncode(items) {
  const call = client.StreamEncode(deadline());
  call.write({ options });
  for (const item of items) call.write({ item });
  call.end();
  const answers = [];
  for await (const answer of call) answers.push(answer);
  return answers;
}

const response = await encode({ inputs, options });
const [rows, columns] = response.embeddings.shape;
const flat = floats(response.embeddings);

const streamed = await streamEncode([
  { id: "image", input: inputs[0] },
  { id: "bad", input: { image: { data: Buffer.from("not an image") } } },
  { id: "text", input: inputs[1] },
]);

const refused = await encode({ inputs: [] }).then(
  () => null,
  (error) => grpc.status[error.code],
);

console.log(
  JSON.stringify({
    bundle: response.bundle,
    shape: [rows, columns],
    embeddings: Array.from({ length: rows }, (_, i) => flat.slice(i * columns, (i + 1) * columns)),
    norms: response.norms,
    features: response.features,
    streamed: streamed.map((answer) => ({
      id: answer.id,
      embedding: answer.encoding ? floats(answer.encoding.embedding) : null,
      error: answer.error ? grpc.status[answer.error.code] : null,
    })),
    refused,
  }),
);
client.close();
