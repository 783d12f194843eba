// npm run build: static/built/view3d.js, and beside it the licences of every package that is in it.
import {readdirSync, readFileSync, writeFileSync} from "node:fs";
import {build} from "esbuild";

const OUT = "static/built";
const {metafile} = await build({
  entryPoints: ["scripts/view3d.js"], outdir: OUT, bundle: true, minify: true, format: "esm", target: "es2022",
  legalComments: "none", logLevel: "warning", metafile: true,
});
const packages = new Set(Object.keys(metafile.inputs).map(path => path.match(/.*node_modules\/(@[^/]+\/[^/]+|[^/]+)/)?.[0]).filter(Boolean));
const licences = [...packages].sort().map(folder => {
  const {name, version, license} = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const texts = readdirSync(folder).filter(file => /^licen[cs]e/i.test(file)).map(file => readFileSync(`${folder}/${file}`, "utf8").trim());
  return [`${name} ${version} (${license})`, ...texts].join("\n\n");
});
writeFileSync(`${OUT}/LICENSES.txt`, `${licences.join("\n\n\n")}\n`);
