// Asks a server for structured answers through Vercel's SDK; see clients.py.
//
//     npm install --no-save ai@6 @ai-sdk/openai-compatible@2 zod@4
//     node vercel.mjs http://127.0.0.1:8000/v1 images
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, Output, stepCountIs, tool } from 'ai';
import { z } from 'zod';

const [url, folder] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: 'casa', baseURL: url, apiKey: 'none', supportsStructuredOutputs: true });
const model = provider('casa-tiny-digits');
const digits = z.array(z.number().int());

function ask(file, text) {
  return [{ role: 'user', content: [{ type: 'image', image: readFileSync(file) }, { type: 'text', text }] }];
}

const ways = {
  async vercel_object(file) {
    const schema = z.object({ digits, count: z.number().int() });
    const output = Output.object({ schema });
    const answer = await generateText({ model, temperature: 0, maxRetries: 0, messages: ask(file, 'Read the digits.'), output });
    return answer.output;
  },
  async vercel_tool(file) {
    const seen = [];
    const report = tool({
      description: 'Takes the digits.',
      inputSchema: z.object({ digits }),
      execute: async (input) => { seen.push(input.digits); return 'ok'; },
    });
    const options = { model, temperature: 0, maxRetries: 0, tools: { report }, stopWhen: stepCountIs(3) };
    const { text } = await generateText({ ...options, messages: ask(file, 'Report the digits.') });
    if (seen.length !== 1 || seen[0].join(' ') !== text) return { seen, text };
    return { digits: seen[0], count: seen[0].length };
  },
};

for (const [name, way] of Object.entries(ways)) {
  const files = readdirSync(folder).filter((file) => file.endsWith('.png')).sort();
  const others = [];
  for (const file of files) {
    const shown = file.replace('.png', '').split('-')[1].split('_').map(Number);
    const expected = JSON.stringify({ digits: shown, count: shown.length });
    let got;
    try { got = JSON.stringify(await way(join(folder, file))); } catch (error) { got = error.message; }
    if (got !== expected) others.push(`${got} instead of ${expected}`);
  }
  console.log([`${name.padEnd(24)} ${files.length - others.length} of ${files.length}`, ...others].join('\n    '));
}
