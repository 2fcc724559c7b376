// Starts `qp-codegen lsp` and lets it speak with the editor.

const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

exports.activate = async function () {
  const command = workspace.getConfiguration("qspec").get("server");
  const server = { command, args: ["lsp"] };
  client = new LanguageClient("qspec", "qspec", server, {
    documentSelector: [{ language: "qspec" }],
    // Tables and files that others use are checked again when they change.
    synchronize: { fileEvents: workspace.createFileSystemWatcher("**/*.{qspec,table}") },
  });
  await client.start();
};

exports.deactivate = function () {
  return client?.stop();
};
