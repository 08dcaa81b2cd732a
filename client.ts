#!/usr/bin/env bun
/**
 * The terminal client of bun-chat: a chat room over TCP, one message a line.
 *   bun client.ts                                      the menu, on the server of this machine
 *   bun client.ts --host chat.example.org --name Alex  straight into that room
 *   tail -f app.log | bun client.ts --name logbot      in a pipe it is a tool
 *
 * It speaks Budget Chat (Protohackers, problem 3) with any server. `receiveMessages` owns the
 * connection and keeps it up, `sendMessages` passes on what is typed. They meet at a screen, where
 * what arrives never disturbs what is being typed, and no byte of a server is ever a control.
 */
import { readFileSync, writeSync } from "node:fs";
import { createInterface, type Interface } from "node:readline";
import { parseArgs } from "node:util";

const { stdin, stdout } = process;
const VERSION = "0.1.0";
const MAX_LINE = 1024 * 1024; // characters of a server's line; a roster of 10,000 names has 350 KB
const MAX_SHOWN = 8192; // characters of a line that are shown, or sent; a message has 4096 bytes
const MAX_PEOPLE = 10_000; // names remembered for Tab
const PATIENCE = "Waiting for the server to take the last lines. Ctrl+C ends at once.";
const [WHO, SAY] = ["Enter your username: ", "You: "];

/** What our server does for a line that begins with `/`; only /quit is done here. */
const COMMANDS = {
  "/help": "what the server can do",
  "/who": "who is here",
  "/nick NAME": "be called NAME from now on",
  "/msg NAME TEXT": "say TEXT to NAME and to nobody else",
  "/quit": "end the program",
};
const commands = Object.entries(COMMANDS).map(([usage, does]) => `  ${usage.padEnd(15)} ${does}`);
const HELP = `bun-chat ${VERSION}: talk to everybody in a room, from your terminal.

Usage: bun client.ts [options]
  --host HOST     where the server is (default 127.0.0.1)
  --port PORT     and its port (default 5555)
  --name NAME     join as NAME at once, without the menu
  --tls           encrypt; the certificate must be good for HOST
  --ca FILE       the same, for a certificate that this PEM file vouches for
  --bell          ring when somebody mentions you or writes to you alone
  --help, --version

In the chat:
${commands.join("\n")}
  //text          say a line that begins with /
  q               leave the chat, back to the menu
  Tab             complete a name or a command; once more for the next one
  Up, Down        what you said before
  Enter           on an empty line: end the program, as do Ctrl+D and Ctrl+C

In a pipe there is no menu, and without --name the first line is the name. NO_COLOR=1 is honoured.

Examples:
  bun client.ts --name Alex
  bun client.ts --host chat.example.org --port 6000 --bell
  tail -f app.log | bun client.ts --name logbot > room.txt
`;

// ---- Text: bytes to lines, lines to what they mean. Nothing here knows a socket or a terminal.
/**
 * Returns a function that takes the next bytes of a stream and returns the lines they complete, of
 * `limit` characters at most, without what could steer a terminal or reorder its text: C0 but tab,
 * DEL, C1, line separators, bidirectional overrides and isolates (Unicode UAX #9).
 */
export function splitLines(limit: number): (chunk: Uint8Array) => string[] {
  const unsafe = /[\0-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let unfinished = "";
  return (chunk) => {
    const lines = decoder.decode(chunk, { stream: true }).split("\n");
    lines[0] = (unfinished + lines[0]).slice(0, limit);
    unfinished = lines.pop() ?? "";
    return lines.map((line) => line.replace(unsafe, ""));
  };
}

/** A line of the room, with the parts that say what it is; a mere notice has none. */
type Part = "from" | "to" | "who" | "did" | "renamed" | "roster";
type Entry = { text: string } & Partial<Record<Part, string>>;
type Crowd = Entry & { crowd: string[] }; // neighbours that all joined, or all left, are one

// A name has no space and no punctuation, so nothing that people say can look like one of these. Some
// scripts cannot do without joiners.
const NAME = "[\\p{L}\\p{N}][\\p{L}\\p{M}\\p{N}\\u200c\\u200d]{0,63}";
const FORMS = [
  `\\[(?<from>${NAME})(?: -> (?<to>${NAME}))?\\] `,
  `\\* (?<who>${NAME}) has (?<did>joined|entered|left) the (?:chat|room)`,
  `\\* (?<who>${NAME}) is now called (?<renamed>${NAME})$`,
  `\\* (?:The room contains|\\d+ (?:people are|person is) here):(?<roster>.*)`,
];
const FORM = new RegExp(`^(?:${FORMS.join("|")})`, "u");
const classify = (text: string): Entry => ({ text, ...FORM.exec(text)?.groups });

/** Keeps who is here, the latest speakers last. */
function remember(people: Set<string>, { from, to, who, did, renamed, roster }: Entry): void {
  if (roster !== undefined) people.clear();
  const here = [from, to, renamed, did === "left" ? "" : who, ...(roster?.match(/[^\s,]+/g) ?? [])];
  for (const name of [who, ...here]) if (name) people.delete(name);
  if (people.size >= MAX_PEOPLE) return;
  for (const name of here) if (name && !(renamed && name === who)) people.add(name);
}

/** What Tab offers for the text before the cursor: whole replacements of it, the best first. */
function complete(before: string, people: Iterable<string>): string[] {
  const kept = before.replace(/\S*$/, "");
  const commands = Object.keys(COMMANDS).map((usage) => usage.replace(/ .*/, " "));
  const names = [...people].reverse().map((name) => kept + name + (kept ? " " : ": "));
  const offers = before.startsWith("/") && !kept ? commands : names;
  return offers.filter((offer) => offer.toLowerCase().startsWith(before.toLowerCase()));
}

// Of the 256 colours those with a contrast of 4:1 or better on black and on white alike.
const COLOURS = [28, 30, 31, 62, 64, 97, 99, 130, 131, 133, 161, 163];
const COLOURED = stdout.isTTY && stdout.hasColors();
const paint = (sgr: string, text: string) => (COLOURED ? `\x1b[${sgr}m${text}\x1b[0m` : text);

/** An entry as its reader sees it: the time, who speaks, and a bell if it is meant for them. */
function render({ from, to, did, text, crowd }: Crowd, reader: string, bell: string): string {
  const time = paint("2", new Date().toTimeString().slice(0, 5)); // dim
  const few = crowd.length > 3 ? [...crowd.slice(0, 2), `${crowd.length - 2} others`] : crowd;
  const line = crowd[1] ? `* ${new Intl.ListFormat("en-GB").format(few)} have ${did}` : text;
  const shown = line.length > MAX_SHOWN ? `${line.slice(0, MAX_SHOWN)}… (cut)` : line;
  if (!from) return `${time} ${paint("2", shown)}\n`;
  if (to) return `${time} ${paint("1;35", shown)}${from === reader ? "" : bell}\n`;
  const [sender, said] = [shown.slice(0, from.length + 2), shown.slice(from.length + 2)];
  const colour = `38;5;${COLOURS[Bun.hash.crc32(from.toLowerCase()) % COLOURS.length]}`;
  const words = said.toLowerCase().split(/[^\p{L}\p{M}\p{N}]+/u);
  if (!words.includes(reader.toLowerCase())) return `${time} ${paint(colour, sender)}${said}\n`;
  return `${time} ${paint(`1;7;${colour}`, sender)}${paint("1", said)}${bell}\n`;
}

// ---- The room: a stay in the chat, over as many connections as it takes.
/** In ms: for a server to speak, before the first new try, and for a refusal to become one. */
export const PACE = { silence: 10_000, retry: 1000, doubt: 500 };
type Address = { host: string; port: number; tls: boolean | { ca: string } };
type Line = { text: string; typed: boolean }; // typed is neither pasted nor piped
type Screen = ReturnType<typeof terminal>;
type Room = ReturnType<typeof receiveMessages>;
const PROBLEMS: [code: RegExp, remedy: string][] = [
  [/ECONNREFUSED/, "Is the server running?"],
  [/ENOTFOUND/, "There is no such host."],
  [/EPROTO/, "It does not speak TLS: leave --tls away."],
  [/DEPTH_ZERO/, "Its certificate is self-signed: get a copy from its owner, for --ca FILE."],
  [/EXPIRED/, "Its certificate has expired: its owner must renew it."],
  [/ALTNAME/, "Its certificate is for a wrong host: give --host the name it was made for."],
  [/ISSUER|LEAF|CHAIN/, "Its certificate is of an unknown authority: get theirs, for --ca FILE."],
];

/**
 * Gets into the room and shows on `screen` what comes from there. When the connection is lost after
 * the name was accepted, makes it anew under the same name, until you leave.
 */
export function receiveMessages({ host, port, tls }: Address, screen: Screen, pace = PACE) {
  type Stage = "closed" | "connecting" | "greeting" | "greeted" | "asked" | "joined";
  let stage: Stage = "closed";
  let socket: Bun.Socket<undefined> | undefined;
  let timer: Timer | undefined; // for the one thing waited for: words, or the next try
  let split = splitLines(MAX_LINE);
  let [name, tries] = ["", 0];
  let unclear: { words: string; accept(): void } | undefined; // words that may be a refusal
  let outcome = Promise.withResolvers<string>(); // of join and leave
  let [member, leaving] = [false, false]; // a member's name was accepted once
  const queue: Uint8Array[] = [];
  let taken = 0; // bytes of queue[0] that the kernel has
  let flushed = () => {};
  const unreachable = `Could not connect to ${host}:${port}.`;
  const handlers: Bun.SocketHandler<undefined> = {
    open(opened) {
      if (stage !== "connecting") return void opened.end(); // too late
      socket = opened;
      expect("greeting");
    },
    data: (from, chunk) => void (from === socket && show(split(chunk).map(classify).filter(heard))),
    drain: () => flush(),
    close: (from) => void (from === socket && end(unclear?.words ?? "Connection lost.", true)),
    handshake: (from, _, error) => void (error && from === socket && fail(error)),
    connectError: (_, error) => void (stage === "connecting" && fail(error)),
  };
  function fail({ code = "", message }: NodeJS.ErrnoException) {
    const remedy = PROBLEMS.find(([problem]) => problem.test(code))?.[1];
    end(`${unreachable} ${remedy ?? message}`);
  }
  function after(ms: number, act: () => void) {
    clearTimeout(timer);
    timer = setTimeout(act, ms);
  }
  function expect(next: Stage) {
    stage = next;
    after(pace.silence, () => end(`${unreachable} It says nothing.${tls ? "" : " Try --tls."}`));
  }
  function connect() {
    split = splitLines(MAX_LINE);
    taken = 0; // a line of which the last connection took a part is sent again whole
    expect("connecting");
    Bun.connect({ hostname: host, port, tls, socket: handlers }).catch(() => {}); // connectError
  }
  function heard(entry: Entry): boolean {
    unclear?.accept();
    if (entry.renamed && entry.who === name) name = entry.renamed;
    if (stage === "greeting") unlessRefused(entry, entry.text.startsWith("*"), introduce);
    else if (stage === "asked") unlessRefused(entry, entry.roster === undefined, joined);
    else return stage === "joined";
    return false;
  }
  // A refusal may look like any greeting and any roster: only the end of the connection tells.
  function unlessRefused(entry: Entry, doubtful: boolean, act: (entry: Entry) => void) {
    const accept = () => {
      unclear = undefined;
      clearTimeout(timer);
      act(entry);
    };
    unclear = { words: entry.text, accept };
    if (doubtful) after(pace.doubt, accept);
    else accept();
  }
  function introduce() {
    stage = "greeted";
    if (!name) return outcome.resolve("");
    expect("asked");
    const bytes = Buffer.from(`${name}\n`);
    if (socket?.write(bytes) !== bytes.length) end("Connection lost.");
  }
  function joined({ text, roster = /:(.*)/.exec(text)?.[1] ?? "" }: Entry) {
    [stage, member, tries] = ["joined", true, 0];
    show([{ text, roster }]);
    outcome.resolve("");
    flush();
  }
  function show(entries: Entry[]) {
    if (entries.length === 0 || screen.show(entries, name)) return;
    socket?.pause();
    stdout.once("drain", () => socket?.resume());
  }
  function flush() {
    if (stage !== "joined" || !socket) return;
    while (queue[0]) {
      taken += Math.max(0, socket.write(queue[0].subarray(taken)));
      if (taken < queue[0].length) return;
      taken = 0;
      queue.shift();
    }
    flushed();
    if (leaving) socket.shutdown();
  }
  function end(reason: string, refused = false) {
    const [before, old] = [stage, socket];
    clearTimeout(timer);
    [stage, socket, unclear] = ["closed", undefined, undefined];
    old?.end();
    if (leaving) {
      const lost = queue.splice(0).length;
      member = leaving = false;
      if (lost) screen.notice(`${lost} ${lost === 1 ? "line was" : "lines were"} not sent.`);
      else if (before === "joined" && !refused) screen.notice("The last lines may be lost.");
      outcome.resolve(lost ? "lost" : "");
    } else if (member) {
      // A name refused now was ours a moment ago: the server has not noticed yet that we are gone.
      const seconds = Math.min(30, 2 ** tries++) * (0.8 + Math.random() * 0.4);
      screen.notice(`${reason} Trying again in ${Math.round(seconds)} s.`);
      after(seconds * pace.retry, connect);
    } else if (before === "asked" && refused) outcome.resolve(reason);
    else if (before !== "greeted") outcome.reject(new Error(reason));
  }
  return {
    /** Enters under a name, or only connects. Resolves with the words of a refusal, else "". */
    join(wanted = ""): Promise<string> {
      name = wanted.normalize("NFKC");
      outcome = Promise.withResolvers();
      if (stage === "greeted") introduce();
      else connect();
      return outcome.promise;
    },
    /** Sends a line as soon as possible. Resolves when nothing waits to be sent any more. */
    send(text: string): Promise<void> {
      const sent = new Promise<void>((resolve) => (flushed = resolve));
      queue.push(Buffer.from(`${text}\n`));
      flush();
      return sent;
    },
    /** Sends what waits, half-closes, reads until the server closes. Called again, waits no more. */
    leave(): Promise<string> {
      const last = leaving || stage === "closed" || (stage !== "joined" && queue.length === 0);
      if (!leaving) outcome = Promise.withResolvers();
      leaving = true;
      if (last) end("");
      else if (stage === "joined") after(2000, () => screen.person && screen.notice(PATIENCE));
      flush();
      return outcome.promise;
    },
  };
}

// ---- The screen: a terminal or a pipe.
/** A person's terminal: the line being typed and, above it, all that happens. */
function terminal(bell: string) {
  const people = new Set<string>();
  const ahead: Line[] = []; // entered but not yet asked for
  let wake = () => {};
  const entries: Crowd[] = []; // not yet shown
  let [reader, offers]: [string, string[]] = ["", []];
  let timer: Timer | undefined;
  let [pasting, verbatim] = [false, false]; // verbatim: a line begun in a paste is never a command
  function completer(before: string): [string[], string] {
    const at = offers.indexOf(before);
    if (at === -1) offers = complete(before, people.difference(new Set([reader])));
    const offer = offers[(at + 1) % offers.length] ?? before;
    return [offer === before ? [] : [offer], before];
  }
  const options = { input: stdin, output: stdout, prompt: "", historySize: 1000, completer };
  const rl = createInterface(options) as Interface & { prevRows: number; closed: boolean };
  // While completion is off readline merely echoes: a long paste is quick, then `print` redraws.
  Object.defineProperty(rl, "isCompletionEnabled", { get: () => !pasting, set() {} });
  function raw(on: boolean) {
    stdin.setRawMode(on);
    try {
      writeSync(stdout.fd, `\x1b[?2004${on ? "h" : "l"}`); // bracketed paste
    } catch {} // the terminal is gone
  }
  function print(text: string): boolean {
    if (rl.closed) return stdout.write(text);
    const { rows } = rl.getCursorPos();
    const more = stdout.write(` ${rows ? `\x1b[${rows}A` : ""}\r\x1b[J${text}`);
    rl.prevRows = 0;
    rl.prompt(true);
    return more;
  }
  function flush(): boolean {
    clearTimeout(timer);
    timer = undefined;
    const lines = entries.splice(0).map((entry) => render(entry, reader, bell));
    return print(lines.join(""));
  }
  const resume = () => [raw(true), print("")];
  rl.on("line", (text) => {
    ahead.push({ text: verbatim && text.startsWith("/") ? `/${text}` : text, typed: !pasting });
    verbatim = pasting;
    if (rl.getPrompt() === SAY) rl.prompt();
    wake();
  });
  rl.on("history", (history) => rl.getPrompt() === SAY || history.shift());
  rl.on("close", () => [stdout.write("\r\x1b[J"), wake()]);
  rl.once("error", () => rl.close()).on("error", () => {}); // a dead terminal fails at each step
  rl.on("SIGINT", () => process.emit("SIGINT", "SIGINT"));
  rl.on("SIGTSTP", () => {
    stdout.write("\n");
    raw(false);
    process.kill(0, "SIGTSTP");
    setTimeout(() => stdin.isRaw || resume(), 100); // where no shell is, nothing stops or continues
  });
  process.on("SIGCONT", resume);
  process.on("exit", () => raw(false));
  stdin
    .on("error", () => {})
    .on("keypress", (_, { name }: { name?: string }) => {
      if (name === "paste-start") [pasting, verbatim] = [true, rl.line === ""];
      if (name === "paste-end") [pasting, verbatim] = [false, false, print("")];
    });
  stdout.prependListener("resize", () => (rl.prevRows = rl.getCursorPos().rows)); // text reflows
  raw(true);
  return {
    person: true,
    /** Resolves with the next line entered, or undefined at the end of input. */
    async ask(question: string): Promise<Line | undefined> {
      rl.setPrompt(question);
      if (!rl.closed) rl.prompt(true);
      while (!ahead[0] && !rl.closed) await new Promise<void>((resolve) => (wake = resolve));
      if (question !== SAY) rl.setPrompt(""); // it is answered
      return ahead.shift();
    },
    /** Shows what the room said; false if no more should come before stdout drains. */
    show(more: Entry[], name: string): boolean {
      reader = name;
      for (const entry of more) {
        remember(people, entry);
        const { who = "", did } = entry;
        const last = entries.at(-1);
        if (did && did === last?.did) last.crowd.push(who);
        else entries.push({ ...entry, crowd: [who] });
      }
      if (!entries.every(({ did }) => did)) return flush();
      timer ??= setTimeout(flush, 200); // ms, for others to share the line
      return true;
    },
    /** Shows what the client itself has to say. */
    notice: (text: string): void => void (flush(), print(`${text}\n`)),
    close() {
      rl.setPrompt("");
      wake = () => {};
      flush();
      rl.close();
    },
  };
}

/** The standard input and output of a tool. */
function pipe(): Screen {
  const lines = (async function* (split = splitLines(MAX_LINE)) {
    for await (const chunk of Bun.stdin.stream()) yield* split(chunk);
    yield* split(Buffer.from("\n"));
  })();
  return {
    person: false,
    ask: () =>
      lines.next().then(({ done, value }) => (done ? undefined : { text: value, typed: false })),
    show: (entries) => stdout.write(entries.map(({ text }) => `${text}\n`).join("")),
    notice: (text) => console.error(text),
    close() {},
  };
}

// ---- The conversation.
/** Shows the menu until a choice is made. Resolves with the name to join under, "" to exit. */
export async function menu(screen: Screen): Promise<string> {
  for (;;) {
    screen.notice("1. Join the chat\nq. Leave the chat\n2. Exit the program");
    const line = await screen.ask("Enter your choice: ");
    const choice = line?.text.trim();
    if (!line || (line.typed && !choice) || choice === "2" || choice === "/quit") return "";
    const name = choice === "1" && (await screen.ask(WHO))?.text.trim();
    if (name) return name;
  }
}

/** Sends what is entered. Resolves with whether to go back to the menu, not to the end. */
export async function sendMessages(screen: Screen, room: Room): Promise<boolean> {
  for (;;) {
    const line = await screen.ask(SAY);
    if (!line || /^\/quit(\s|$)/i.test(line.text) || (line.typed && !line.text)) return false;
    if (line.typed && line.text === "q") return true;
    const sent = line.text.trim() && room.send(line.text);
    if (!screen.person) await sent; // a tool has time, a person types on
  }
}

function readOptions() {
  const [text, flag] = [{ type: "string" }, { type: "boolean", default: false }] as const;
  const address = { host: text, port: text, tls: flag, ca: text };
  const options = { ...address, name: text, bell: flag, help: flag, version: flag };
  try {
    const { host = "127.0.0.1", port = "5555", ca, ...rest } = parseArgs({ options }).values;
    const pem = ca === undefined ? "" : readFileSync(ca, "utf8");
    if (ca && !pem.includes("BEGIN CERTIFICATE")) throw new Error(`${ca} holds no PEM certificate`);
    if (!/^\d{1,5}$/.test(port) || +port < 1 || +port > 65535)
      throw new Error(`--port is a number from 1 to 65535, not '${port}'`);
    return { ...rest, host, port: +port, tls: ca ? { ca: pem } : rest.tls };
  } catch (error) {
    const { syscall, path, message } = error as NodeJS.ErrnoException;
    const [what] = message.split(/\. |\.\n/);
    console.error(syscall ? `${path || "--ca"} cannot be read.` : `${what}. Try --help.`);
    process.exit(syscall ? 1 : 2);
  }
}

/** The program: menu or pipe, join, talk, leave, and every way out. */
export async function main(): Promise<void> {
  stdout.on("error", ({ code, message }: NodeJS.ErrnoException) => {
    if (code === "EPIPE" || code === "EIO") process.exit(0); // nobody reads any more
    console.error(message);
    process.exit(1);
  });
  const options = readOptions();
  if (options.help) return void stdout.write(HELP);
  if (options.version) return console.log(VERSION);
  const screen = stdin.isTTY && stdout.isTTY ? terminal(options.bell ? "\x07" : "") : pipe();
  const room = receiveMessages(options, screen);
  function finish(code: number, words = "") {
    screen.close();
    if (words) console.error(words);
    process.exitCode = code;
    stdout.end(() => process.exit());
  }
  const failures = ["uncaughtException", "unhandledRejection"]; // the second when join throws
  for (const failure of failures) process.on(failure, (error: Error) => finish(1, error.message));
  const stop = (code: number) => () => {
    setImmediate(() => room.leave().then(() => finish(code))); // after what was typed before
    setTimeout(room.leave, 1000);
    setTimeout(() => process.exit(code), 2000); // nobody reads what waits for stdout
  };
  process.on("SIGINT", stop(screen.person ? 0 : 130)).on("SIGTERM", stop(143));
  if (screen.person) process.on("SIGHUP", stop(129));
  await room.join();
  if (screen.person && !options.name) screen.notice("Connected to server.");
  let name =
    options.name || (screen.person ? await menu(screen) : (await screen.ask(""))?.text.trim());
  if (!name && !screen.person) throw new Error("A name is needed: the first line, or --name.");
  let lost = "";
  while (name) {
    if (screen.person) screen.notice(`Joining the chat as ${name}...`);
    const refusal = await room.join(name);
    if (refusal && !screen.person) throw new Error(refusal);
    if (refusal) screen.notice(refusal);
    const again = !refusal && (await sendMessages(screen, room));
    if (!refusal) lost = await room.leave();
    name = refusal ? (await screen.ask(WHO))?.text.trim() : again ? await menu(screen) : "";
  }
  finish(lost ? 1 : 0);
}

if (import.meta.main) void main();
