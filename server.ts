#!/usr/bin/env bun
/**
 * The server of bun-chat: a room that relays each line to everybody else in it.
 *
 *     bun server.ts             opens a room on 127.0.0.1:5555
 *     bun client.ts             enters it, in another terminal
 *     nc 127.0.0.1 5555         enters it from a machine without Bun
 *
 * The protocol is lines of UTF-8 over TCP (Budget Chat, https://protohackers.com/problem/3). The
 * server asks for a name; the first line is the name and every further one a message, unless it
 * begins with "/", which makes it a command. Lines that the server itself says begin with "* ".
 *
 * One idea carries the rest: whatever arrives in one turn of the event loop, from all sockets,
 * leaves together, with one write per client. So a line costs little even in a large room, and all
 * see the same lines in the same order. Who reads slowly has a queue of their own, with a limit;
 * who sends too fast is read from more slowly; neither holds up anybody else.
 */

import { parseArgs } from "node:util";
import type { Socket, TCPSocketListener } from "bun";

const VERSION = "0.1.0";

const WELCOME = "Welcome to the chat! What is your name?\n";
const MAX_LINE = 4096; // bytes, without the line ending
const MAX_QUEUE = 1024 * 1024; // bytes that may wait for a reader who does not keep up
const BURST = 10; // seconds' worth of messages that may come at once
const NAME_DEADLINE = 60_000; // ms from connecting to giving a name
const CLOSE_DEADLINE = 10_000; // ms that a leaving client may take to read some more of its queue
const STOP_DEADLINE = 2_000; // ms that all clients together get to read their queues at shutdown
const PACE = 100; // ms until the next look at one who has sent too fast
const KEEPALIVE = 60_000; // ms of silence before the kernel asks whether the peer is still there
const MAX_REST = 50; // ms that a line may wait while a very large room rests from a flush
const SPARE_SOCKETS = 64; // descriptors beyond the clients': files, and those who are being refused

/** What `startServer` can be told. */
export type ServerOptions = {
  host: string;
  port: number; // 0 takes any free one
  rate: number; // messages a second that one client may send; 0 for no limit
  maxClients: number; // connections at a time
  log?: (event: string) => void; // hears who comes, what is said and who goes
  logError?: (problem: string) => void; // hears what went wrong; the chat goes on
};

const DEFAULTS: ServerOptions = { host: "127.0.0.1", port: 5555, rate: 10, maxClients: 10_000 };

// --- State -------------------------------------------------------------------------------------
// Two records, written as classes so that each field stands beside its meaning and first value.

const NOTHING = Buffer.alloc(0);

/** One connection, from its greeting to its end. It is `socket.data` of its socket. */
class Client {
  /** A refused one goes from naming to closing. Only who has joined is in the room. */
  phase: "naming" | "joined" | "closing" | "gone" = "naming";
  name = "";
  place = -1; // its index in `room.clients`, so that it leaves without a search
  deadline = performance.now() + NAME_DEADLINE; // ms; the end of patience outside the room
  unread: Buffer = NOTHING; // the beginning of a line, or lines ahead of the allowance
  heldBack: Timer | undefined; // set while it is not read from because it has sent too fast
  allowance = Infinity; // messages that it may send, as of `refilled` (ms)
  refilled = performance.now();
  queue: Uint8Array[] = []; // what the kernel did not take: views on batches, shared with others
  queued = 0; // bytes in the queue
  cuts: Cut[] | null = null; // how its share of this turn's batch differs from everybody else's

  constructor(readonly socket: Socket<Client>) {}
}

/** Instead of the bytes `from` to `to` of the batch, a client gets `instead`. */
type Cut = { from: number; to: number; instead: Buffer };

/** One server. A process may run several, which is how the tests do it. */
class Room {
  clients: Client[] = [];
  names = new Map<string, Client>(); // by folded name, in the order of coming
  lobby = new Set<Client>(); // connected but not in the room: not yet named, or on the way out
  batch = ""; // what this turn says to everybody
  batchLength = 0; // in bytes
  flushing = false; // a flush is scheduled
  restUntil = 0; // ms; no flush before then
  roster: string | null = null; // the line with all names; null while it is out of date
  received = 0; // chunks since the start, so that a stopping server sees whether more is coming

  constructor(readonly options: ServerOptions) {}
}

// --- The life of a client ----------------------------------------------------------------------

/** Greets a new connection, or turns it away when the server is full. */
export function handleClient(room: Room, socket: Socket<Client>): void {
  const { maxClients, log } = room.options;
  const client = (socket.data = new Client(socket));
  const others = room.clients.length + room.lobby.size;
  room.lobby.add(client);
  if (others < maxClients) {
    socket.setKeepAlive(true, KEEPALIVE);
    log?.(`New connection from ${endpoint(socket.remoteAddress, socket.remotePort)}`);
    return send(client, Buffer.from(WELCOME));
  }
  dismiss(room, client, "* The server is full. Try again later.");
  // A crowd at the door must not use up the descriptors, even if the last ones miss the reason.
  if (others >= maxClients + SPARE_SOCKETS / 2) socket.end();
}

/** Takes the first line for a name: the client enters the room, or hears why not and is let go. */
function join(room: Room, client: Client, line: string): void {
  const name = line.normalize("NFKC");
  const refusal = refuseName(room, client, name);
  if (refusal) return dismiss(room, client, refusal);
  // The roster goes out at once. All that the room hears from here on is in the batch behind it.
  send(client, Buffer.from(roster(room) + "\n"));
  broadcastMessage(room, `* ${name} has joined the chat`);
  client.cuts = [{ from: 0, to: room.batchLength, instead: NOTHING }];
  client.name = name;
  client.phase = "joined";
  client.place = room.clients.push(client) - 1;
  if (room.roster !== null) room.roster += room.names.size > 0 ? `, ${name}` : name;
  room.names.set(foldName(name), client);
  room.lobby.delete(client);
  room.options.log?.(`User ${name} has joined the chat.`);
}

// Letters, marks and digits of any script, less those that cannot be seen: a name of Hangul fillers
// would look like no name (Default_Ignorable_Code_Point, Unicode UAX #44). No HTTP request begins
// with one (RFC 9112, section 3), so no web page can talk into the room.
const NAME = /^[[\p{L}\p{N}]--\p{DI}][[\p{L}\p{M}\p{N}]--\p{DI}]{0,31}$/v;

function refuseName(room: Room, client: Client, name: string): string | null {
  if (!NAME.test(name)) return "* A name is 1 to 32 letters and digits.";
  const holder = room.names.get(foldName(name));
  return holder && holder !== client ? `* The name ${name} is taken.` : null;
}

/** Two names with the same folded form are the same: ALICE and alice, Straße and STRASSE. */
function foldName(name: string): string {
  return name.normalize("NFKC").toUpperCase().toLowerCase().normalize("NFKC");
}

function roster(room: Room): string {
  const names = () => Array.from(room.names.values(), (client) => client.name).join(", ");
  return (room.roster ??= `* The room contains: ${names()}`);
}

/** Lets a client go: it gets what was said up to now, and the notice why, if any; then a FIN. */
function dismiss(room: Room, client: Client, notice?: string): void {
  if (client.phase !== "naming" && client.phase !== "joined") return;
  if (notice) tell(room, client, notice);
  if (client.phase === "joined") deliver(client, Buffer.from(room.batch));
  removeClient(room, client);
  client.phase = "closing";
  client.deadline = performance.now() + CLOSE_DEADLINE;
  room.lobby.add(client);
  closeWhenSent(client);
}

/** Takes a client out of the room, if it is in it, and tells the others that it has left. */
export function removeClient(room: Room, client: Client, why = ""): void {
  room.lobby.delete(client);
  if (client.heldBack) readOn(client);
  if (client.phase === "joined") {
    const last = room.clients.pop();
    if (last && last !== client) {
      room.clients[client.place] = last;
      last.place = client.place;
    }
    room.names.delete(foldName(client.name));
    room.roster = null;
    broadcastMessage(room, `* ${client.name} has left the chat${why}`);
    room.options.log?.(`Removing user: ${client.name} from clients${why}`);
  }
  client.phase = "gone";
}

/** Sends the FIN once all is sent. `end()` could destroy what is still on its way. */
function closeWhenSent(client: Client): void {
  if (client.phase === "closing" && client.queued === 0) client.socket.shutdown();
}

/** The connection is closed, by whomever. Nothing can be told to this client any more. */
function closed(room: Room, client: Client): void {
  const lost = countLines(client.unread);
  removeClient(room, client, lost > 0 ? ` (${lost} lines unread)` : "");
}

function countLines(bytes: Buffer): number {
  return bytes.toString("latin1").split("\n").length - 1;
}

/** Looks once a second for those who take too long to give their name or to close. */
function sweep(room: Room): void {
  for (const client of room.lobby) {
    if (performance.now() < client.deadline) continue;
    if (client.phase === "closing") client.socket.terminate();
    else dismiss(room, client, `* You gave no name within ${NAME_DEADLINE / 1000} seconds.`);
  }
}

// --- The way of a message ----------------------------------------------------------------------

/** Bytes have come. They are lines only as far as they end in a newline. */
function receive(room: Room, client: Client, chunk: Buffer): void {
  room.received++;
  client.unread = client.unread.length > 0 ? Buffer.concat([client.unread, chunk]) : chunk;
  if (!client.heldBack) readLines(room, client);
}

/** Takes as many lines as the allowance lets through, and keeps the rest for later. */
function readLines(room: Room, client: Client): void {
  const bytes = client.unread;
  client.unread = NOTHING;
  const { rate } = room.options;
  const now = performance.now();
  const grown = client.allowance + ((now - client.refilled) / 1000) * rate;
  if (rate > 0) client.allowance = Math.min(grown, rate * BURST);
  client.refilled = now;
  let start = 0;
  while (client.phase === "naming" || client.phase === "joined") {
    const end = bytes.indexOf(10, start); // \n
    if (end === -1) return keepUnfinished(client, bytes.subarray(start));
    if (client.allowance < 1) return holdBack(room, client, bytes.subarray(start));
    client.allowance--;
    takeLine(room, client, bytes, start, end);
    start = end + 1;
  }
}

/** A line is bytes until it is whole: a character may be split over two packets. */
function takeLine(room: Room, client: Client, bytes: Buffer, start: number, end: number): void {
  if (end > start && bytes[end - 1] === 13) end--; // \r
  const tooLong = end - start > MAX_LINE;
  const line = tooLong ? "" : bytes.toString("utf8", start, end).replace(UNCLEAN, "");
  if (client.phase === "naming") join(room, client, line);
  else if (tooLong)
    tell(room, client, `* Your message was longer than ${MAX_LINE} bytes and was not sent.`);
  else if (line.startsWith("/") && !line.startsWith("//")) obey(room, client, line);
  else if (/\S/.test(line)) {
    const text = line.startsWith("//") ? line.slice(1) : line;
    broadcastMessage(room, `[${client.name}] ${text}`, client);
    room.options.log?.(`Received message from ${client.name}: ${text}`);
  }
}

// C0 and C1 controls but tab, DEL, the line separators, and what turns the direction of a text
// around (Unicode UAX #9): all that could make a terminal or a reader see what nobody wrote.
const UNCLEAN = /[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;

/** Keeps the beginning of a line, as a copy: a view would hold the whole chunk. */
function keepUnfinished(client: Client, rest: Buffer): void {
  if (rest.length > 0) client.unread = Buffer.from(rest.subarray(0, MAX_LINE + 2));
  if (client.heldBack) readOn(client);
}

/** Stops reading from one that sends too fast. TCP in its turn holds back the sender. */
function holdBack(room: Room, client: Client, rest: Buffer): void {
  client.unread = rest;
  client.socket.pause();
  client.heldBack = setTimeout(readLines, PACE, room, client);
}

function readOn(client: Client): void {
  clearTimeout(client.heldBack);
  client.heldBack = undefined;
  client.socket.resume();
}

/**
 * Says a line, given without its ending, to everybody in the room but its sender, together with all
 * else that this turn brings. Without a sender it is the server that speaks.
 */
export function broadcastMessage(room: Room, line: string, sender?: Client): void {
  const from = room.batchLength;
  room.batch += line + "\n";
  room.batchLength += Buffer.byteLength(line) + 1;
  if (sender) cut(sender, from, room.batchLength, NOTHING);
  scheduleFlush(room);
}

/** Says a line to one client, after all that it has been sent so far. */
function tell(room: Room, client: Client, line: string): void {
  const bytes = Buffer.from(line + "\n");
  if (client.phase !== "joined") return send(client, bytes);
  cut(client, room.batchLength, room.batchLength, bytes);
  scheduleFlush(room);
}

/** Notes that a client gets `instead` in place of the bytes `from` to `to` of this turn's batch. */
function cut(client: Client, from: number, to: number, instead: Buffer): void {
  client.cuts ??= [];
  const last = client.cuts.at(-1);
  if (last && last.to === from && instead === NOTHING) last.to = to;
  else client.cuts.push({ from, to, instead });
}

/**
 * A flush is a system call per client, so in a large room it pays to let lines gather: the room
 * rests for as long as its last flush took. In a small one no timer could measure that.
 */
function scheduleFlush(room: Room): void {
  if (room.flushing) return;
  room.flushing = true;
  const rest = room.restUntil - performance.now();
  if (rest >= 1) setTimeout(flush, rest, room);
  else setImmediate(flush, room);
}

/** Sends this turn's batch: the very same bytes to all but those who had a part in it. */
function flush(room: Room): void {
  const started = performance.now();
  const batch = Buffer.from(room.batch);
  room.batch = "";
  room.batchLength = 0;
  room.flushing = false;

  // A copy, because a removal moves the last client into the place of the one removed. What is said
  // about the removal goes into the next batch.
  for (const client of [...room.clients]) {
    const lagged = client.queued > 0;
    deliver(client, batch);
    // One batch may be larger than the limit: only who has not kept up with earlier ones is slow.
    if (!lagged || client.queued <= MAX_QUEUE) continue;
    removeClient(room, client, " (too slow)");
    client.socket.terminate();
  }
  const took = performance.now() - started;
  room.restUntil = started + took + Math.min(took, MAX_REST);
}

function deliver(client: Client, batch: Buffer): void {
  const { cuts } = client;
  if (!cuts) return send(client, batch);
  client.cuts = null;
  const pieces: Uint8Array[] = [];
  let at = 0;
  for (const { from, to, instead } of cuts) {
    pieces.push(batch.subarray(at, from), instead);
    at = to;
  }
  pieces.push(batch.subarray(at));
  send(client, Buffer.concat(pieces));
}

/** Hands bytes to the kernel. What it does not take waits in the client's queue for `drain`. */
function send(client: Client, bytes: Uint8Array): void {
  if (bytes.length === 0) return;
  const taken = client.queued > 0 ? 0 : client.socket.write(bytes);
  if (taken < 0 || taken === bytes.length) return; // sent, or closed: `close` will say so
  client.queue.push(bytes.subarray(taken));
  client.queued += bytes.length - taken;
}

/** The kernel has room again, or says so without reason. */
function drain(client: Client): void {
  const { queue, queued } = client;
  client.queue = [];
  client.queued = 0;
  for (const bytes of queue) send(client, bytes);
  if (client.queued < queued) client.deadline = performance.now() + CLOSE_DEADLINE;
  closeWhenSent(client);
}

// --- Commands ----------------------------------------------------------------------------------

const COMMANDS: readonly [usage: string, help: string, run: typeof whisper][] = [
  ["/help", "shows this list", help],
  ["/who", "says who is here", (room, client) => tell(room, client, roster(room))],
  ["/nick NAME", "gives you another name", changeName],
  ["/msg NAME TEXT", "says something to one person only", whisper],
  ["/quit", "leaves the room", (room, client) => dismiss(room, client)],
];

function obey(room: Room, client: Client, line: string): void {
  const [word, rest] = splitWord(line);
  const command = COMMANDS.find(([usage]) => splitWord(usage)[0] === word.toLowerCase());
  if (command) command[2](room, client, rest);
  else tell(room, client, `* Unknown command ${word}. Try /help.`);
}

/** The first word, and what follows without the blanks around it. */
function splitWord(text: string): [word: string, rest: string] {
  const end = text.search(/\s|$/);
  return [text.slice(0, end), text.slice(end).trim()];
}

function help(room: Room, client: Client): void {
  for (const [usage, help] of COMMANDS) tell(room, client, `* ${usage} ${help}`);
  tell(room, client, "* //text says /text, for a message that begins with a slash");
}

function changeName(room: Room, client: Client, wish: string): void {
  const name = wish.normalize("NFKC");
  const refusal =
    name === client.name ? `* You are called ${name} already.` : refuseName(room, client, name);
  if (refusal) return tell(room, client, refusal);
  broadcastMessage(room, `* ${client.name} is now called ${name}`);
  room.options.log?.(`User ${client.name} is now called ${name}.`);
  room.names.delete(foldName(client.name));
  room.names.set(foldName(name), client);
  room.roster = null;
  client.name = name;
}

/** A private message is for two, and therefore never in the log. */
function whisper(room: Room, client: Client, rest: string): void {
  const [name, text] = splitWord(rest);
  const other = room.names.get(foldName(name));
  if (text === "") return tell(room, client, "* Say it like this: /msg NAME TEXT");
  if (!other) return tell(room, client, `* Nobody here is called ${name}.`);
  const line = `[${client.name} -> ${other.name}] ${text}`;
  for (const reader of new Set([client, other])) tell(room, reader, line);
}

// --- Start and shutdown ------------------------------------------------------------------------

/** A running server: what `startServer` returns. */
export type Server = ReturnType<typeof startServer>;

/**
 * Opens a room, which stays open until `stop()` of the returned handle is called.
 *
 * @throws what Bun.listen throws: an error with a code such as EADDRINUSE, or without one when the
 *   host cannot be resolved
 */
export function startServer(options: Partial<ServerOptions> = {}) {
  const room = new Room({ ...DEFAULTS, ...options });
  const { maxClients, logError } = room.options;
  // A process out of descriptors can do nothing, not even refuse. Bun has raised the soft limit.
  const report = process.report.getReport() as { userLimits?: { open_files?: { soft?: unknown } } };
  const limit = Number(report.userLimits?.open_files?.soft) || Infinity; // may be "unlimited"
  room.options.maxClients = Math.min(maxClients, Math.max(1, limit - SPARE_SOCKETS));
  const listener = Bun.listen<Client>({
    hostname: room.options.host,
    port: room.options.port,
    allowHalfOpen: true,
    socket: {
      open: (socket) => handleClient(room, socket),
      data: (socket, chunk) => receive(room, socket.data, chunk),
      drain: (socket) => drain(socket.data),
      // Who has sent a FIN may still read (`echo hi | nc -N`). A paused socket shows it later.
      end: (socket) => dismiss(room, socket.data),
      close: (socket) => closed(room, socket.data),
      error: (socket, error) => {
        logError?.(error.stack ?? String(error));
        socket.terminate();
      },
    },
  });
  const sweeper = setInterval(sweep, 1000, room);
  return {
    port: listener.port,
    maxClients: room.options.maxClients,
    clients: room.clients as readonly Readonly<Pick<Client, "name" | "queued">>[],
    stop: () => stop(room, listener, sweeper), // takes 2 s at most, and a little
  };
}

/** Delivers what was said, announces the end, and gives everybody two seconds to read it all. */
async function stop(room: Room, listener: TCPSocketListener<Client>, sweeper: Timer) {
  listener.stop(false);
  clearInterval(sweeper);
  // What clients have sent before is in the kernel: it is all read when a look brings nothing new.
  let deadline = performance.now() + STOP_DEADLINE / 4;
  for (let seen = -1; seen < room.received && performance.now() < deadline; await Bun.sleep(5))
    seen = room.received;
  for (const client of room.clients) {
    const lines = countLines(client.unread);
    if (lines > 0) tell(room, client, `* Your last ${lines} lines came too late to be sent.`);
  }
  broadcastMessage(room, "* The server is shutting down");
  flush(room);
  for (const client of room.clients.splice(0)) room.lobby.add(client);
  for (const client of room.lobby) {
    if (client.phase === "naming") tell(room, client, "* The server is shutting down");
    client.phase = "closing";
    if (client.heldBack) readOn(client);
    closeWhenSent(client);
  }
  deadline = performance.now() + STOP_DEADLINE;
  while (room.lobby.size > 0 && performance.now() < deadline) await Bun.sleep(5);
  for (const client of room.lobby) client.socket.terminate();
}

// --- The program -------------------------------------------------------------------------------

const USAGE = `Usage: bun server.ts [options]

Opens a chat room. People enter it with "bun client.ts", or with "nc HOST PORT".

  --host HOST        the address to listen on (${DEFAULTS.host}; 0.0.0.0 for the whole network)
  --port PORT        the port to listen on (${DEFAULTS.port}; 0 takes a free one)
  --rate N           messages a second that one client may send (${DEFAULTS.rate}; 0 for no limit)
  --max-clients N    connections at a time (${DEFAULTS.maxClients})
  --quiet            print only start, stop and errors
  --help             show this text
  --version          show the version`;

function main(): void {
  const { quiet, ...options } = readOptions();
  const print = createPrinter(process.stdout);
  const logError = createPrinter(process.stderr);
  let server: Server;
  try {
    server = startServer({ ...options, ...(quiet ? {} : { log: print }), logError });
  } catch (error) {
    const code = error instanceof Error && "code" in error ? error.code : undefined;
    const reason = LISTEN_PROBLEMS.get(code) ?? "The host is unknown: choose another with --host.";
    console.error(`Could not listen on ${endpoint(options.host, options.port)}. ${reason}`);
    process.exit(1);
  }
  if (server.maxClients < options.maxClients)
    print(`At most ${server.maxClients} clients: more would need more open files (ulimit -n).`);
  print(`Server is running on ${endpoint(options.host, server.port)}, waiting for connections...`);

  let stopping = false;
  const onSignal = (_signal: string, number: number) => {
    if (stopping) process.exit(128 + number);
    stopping = true;
    print("Server is shutting down");
    void server.stop();
  };
  process.on("SIGINT", onSignal).on("SIGTERM", onSignal);
}

function readOptions(): ServerOptions & { quiet: boolean } {
  try {
    const { values } = parseArgs({
      options: {
        host: { type: "string", default: DEFAULTS.host },
        port: { type: "string", default: `${DEFAULTS.port}` },
        rate: { type: "string", default: `${DEFAULTS.rate}` },
        "max-clients": { type: "string", default: `${DEFAULTS.maxClients}` },
        quiet: { type: "boolean", default: false },
        help: { type: "boolean" },
        version: { type: "boolean" },
      },
    });
    if (values.help || values.version) {
      console.log(values.help ? USAGE : `bun-chat server ${VERSION}`);
      process.exit(0);
    }
    return {
      host: values.host,
      port: wholeNumber("--port", values.port, 0, 65_535),
      rate: wholeNumber("--rate", values.rate, 0, 1_000_000),
      maxClients: wholeNumber("--max-clients", values["max-clients"], 1, 1_000_000),
      quiet: values.quiet,
    };
  } catch (error) {
    // parseArgs goes on about positional arguments, of which there are none.
    const [what] = (error instanceof Error ? error.message : String(error)).split(/\.\s/);
    console.error(`${what}. See bun server.ts --help.`);
    process.exit(2);
  }
}

function wholeNumber(option: string, text: string, least: number, most: number): number {
  const number = /^\d+$/.test(text) ? Number(text) : NaN;
  if (number >= least && number <= most) return number;
  throw new Error(`${option} takes a whole number from ${least} to ${most}, and "${text}" is none`);
}

const LISTEN_PROBLEMS = new Map<unknown, string>([
  ["EADDRINUSE", "The port is in use: choose another one with --port."],
  ["EADDRNOTAVAIL", "The address is not one of this machine's: choose another one with --host."],
  ["EACCES", "That port is for the administrator: choose one above 1023 with --port."],
]);

/** As a person would type it, with brackets around an IPv6 address (RFC 3986, section 3.2.2). */
function endpoint(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/**
 * Prints lines with the local time, all of a turn at once. When nobody reads them, they are counted
 * and not kept; when the stream is closed, the chat goes on all the same.
 */
function createPrinter(stream: NodeJS.WriteStream): (line: string) => void {
  let turn = "";
  let lost = 0;
  stream.on("error", () => {});
  const write = () => {
    stream.write(turn);
    turn = "";
  };
  return (line) => {
    if (stream.writableLength > MAX_QUEUE) return void lost++;
    if (turn === "") setImmediate(write);
    const time = new Date().toLocaleString("sv"); // Swedish writes 2026-12-31 23:59:59
    if (lost > 0) turn += `${time} (${lost} lines are missing here: nobody read them)\n`;
    lost = 0;
    turn += `${time} ${line}\n`;
  };
}

if (import.meta.main) main();
