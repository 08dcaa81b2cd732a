#!/usr/bin/env bun
/**
 * The server of bun-chat: a room that relays each line to everybody else in it.
 *
 *     bun server.ts             opens a room on 127.0.0.1:5555
 *     bun client.ts             enters it, in another terminal
 *     nc 127.0.0.1 5555         enters it from a machine without Bun
 *
 * The protocol is lines of UTF-8 over TCP (Budget Chat, https://protohackers.com/problem/3): first
 * a name, then messages, or commands if they begin with "/". The server's own begin with "* ".
 *
 * One idea carries the rest: whatever arrives at about the same time, from all sockets, leaves
 * together, with one write per client. So a line costs little even in a large room, and all see the
 * same lines in the same order. Who reads slowly has a queue of their own, with a limit; who sends
 * too fast is read from more slowly; neither holds up anybody else.
 */

import { dlopen } from "bun:ffi";
import { parseArgs } from "node:util";

const VERSION = "0.1.0";
const SHUTDOWN = "* The server is shutting down";
const MAX_LINE = 4096; // bytes, without the line ending
const MAX_QUEUE = 1024 * 1024; // bytes that may wait for a reader who does not keep up
const BURST = 10_000; // ms' worth of messages that may come at once
const LOBBY_DEADLINE = 60_000; // ms to give a name in, and to read what is left when leaving
const STOP_DEADLINE = 2_000; // ms to read what is left when the server stops
const PACE = 100; // ms until the next look at one who has sent too fast
const KEEPALIVE = 45_000; // ms of silence before the kernel asks whether the peer is still there
const NO_ANSWER = 55_000; // ms without a sign of life of a peer that cannot be reached
const MAX_GATHER = 1; // ms that a line may wait for others, to leave together with them
const MAX_REST = 50; // ms that news of who is there may wait in a very large room
const SPARE_SOCKETS = 64; // descriptors beyond the clients': files, and those who are being refused

/** What `startServer` can be told. */
export type ServerOptions = {
  host: string;
  port: number; // 0 takes any free one
  rate: number; // messages a second that one client may send; 0 for no limit
  maxClients: number; // connections at a time
  maxPerAddress?: number | undefined; // and from one address; 64, or no limit on loopback
  tls?: Bun.TLSOptions | false; // certificate and key; without them the room is not encrypted
  log?: ((event: string) => void) | undefined; // hears who comes, what is said and who goes
  logError?: (problem: string) => void; // hears what went wrong; the chat goes on
};

const DEFAULTS = { host: "127.0.0.1", port: 5555, rate: 10, maxClients: 10_000 };
const NOTHING = Buffer.alloc(0);
const [NEWLINE, RETURN] = [10, 13];
/** As a person would type it, with brackets around an IPv6 address (RFC 3986, section 3.2.2). */
const endpoint = (host: string, port: number) =>
  `${host.includes(":") ? `[${host}]` : host}:${port}`;
const countLines = (bytes: Buffer) => bytes.toString("latin1").split("\n").length - 1;

// --- State -------------------------------------------------------------------------------------

/** One connection, from its greeting to its end. It is `socket.data` of its socket. */
class Client {
  phase: "connecting" | "naming" | "joined" | "closing" = "connecting";
  refusal = ""; // why it will be turned away, known from its first moment
  name = "";
  address = "";
  deadline = performance.now() + LOBBY_DEADLINE; // ms; patience ends, in the room a look is due
  finished = false; // its FIN has come; what it sent before is still to be read
  unread: Buffer = NOTHING; // the beginning of a line, or lines ahead of the rate
  heldBack = false; // not read from for a while, because it has sent too fast
  usedUntil = -Infinity; // ms; its messages have used its time up to there, each 1/rate of a second
  share: string | null = null; // its own version of the batch: without its own lines, with answers
  shared = 0; // characters of the batch that are in its share already, or left out
  queue: Uint8Array[] = []; // what the kernel did not take: views on batches, most of them shared
  queued = 0; // bytes in the queue
  constructor(readonly socket: Bun.Socket<Client>) {}
}

/** One server. A process may run several, which is how the tests do it. */
class Room {
  clients: Client[] = []; // those in the room, in the order of coming
  names = new Map<string, Client>(); // the same by folded name
  connections = new Set<Client>(); // all: not yet in the room, in it, and on the way out of it
  refused = 0; // of the connections, those that are only told why they cannot enter
  addresses = new Map<string, number>(); // the other connections, from each
  batch = ""; // what the next flush says to everybody
  nextFlush: "none" | "later" | "soon" = "none";
  restUntil = 0; // ms; before then no flush for news alone
  roster: string | null = null; // the line with all names; null while it is out of date
  received = 0; // chunks and FINs so far, by which one sees whether more are coming
  constructor(readonly options: ServerOptions) {}
}

// --- The life of a client ----------------------------------------------------------------------

/** Takes in a new connection. Under TLS it may be spoken to only after the handshake. */
export function handleClient(room: Room, socket: Bun.Socket<Client>): void {
  const { maxClients, maxPerAddress = Infinity, tls, log } = room.options;
  const client = (socket.data = new Client(socket));
  client.address = socket.remoteAddress; // gone when it is closed
  if (!client.address) return void socket.terminate(); // reset while it waited to be accepted
  log?.(`New connection from ${endpoint(client.address, socket.remotePort)}`);
  const total = room.connections.add(client).size - room.refused; // this one among them
  const siblings = (room.addresses.get(client.address) ?? 0) + 1;
  if (total > maxClients) client.refusal = "* The server is full. Try again later.";
  else if (siblings > maxPerAddress) client.refusal = "* Too many connections from your address.";
  else room.addresses.set(client.address, siblings);
  socket.setKeepAlive(true, KEEPALIVE);
  // The refused must not use up the descriptors, even if then the last ones miss the reason.
  if (client.refusal && ++room.refused > SPARE_SOCKETS / 2) socket.end();
  else if (!tls) greet(room, client);
}

function greet(room: Room, client: Client): void {
  client.phase = "naming";
  if (client.refusal) dismiss(room, client, client.refusal);
  else tell(room, client, "Welcome to the chat! What is your name?");
}

/** Takes the first line for a name: the client enters the room, or hears why not and is let go. */
function join(room: Room, client: Client, line: string): void {
  const name = line.normalize("NFKC");
  const refusal = refuseName(room, client, name);
  if (refusal) return dismiss(room, client, refusal);
  // The roster goes out at once. All that the room hears from here on is in the batch behind it.
  tell(room, client, roster(room));
  broadcastMessage(room, `* ${name} has joined the chat`);
  [client.share, client.shared] = ["", room.batch.length];
  client.name = name;
  client.phase = "joined";
  room.roster = roster(room) + (room.clients.length > 0 ? `, ${name}` : name);
  room.clients.push(client);
  room.names.set(foldName(name), client);
  room.options.log?.(`User ${name} has joined the chat.`);
}

// Letters, marks and digits of any script, less those that cannot be seen (Unicode UAX #44). No HTTP
// request begins with one (RFC 9112, section 3), so no web page can talk into the room.
const NAME = /^[[\p{L}\p{N}]--\p{DI}][[\p{L}\p{M}\p{N}]--\p{DI}]{0,31}$/v;
// A Cyrillic "а" in "аlice" looks like the Latin one (Unicode UTS #39, mixed-script confusables).
const ALPHABETS = [/\p{Script=Latin}/u, /\p{Script=Greek}/u, /\p{Script=Cyrillic}/u];

function refuseName(room: Room, client: Client, name: string): string | null {
  if (!NAME.test(name)) return "* A name is 1 to 32 letters and digits.";
  if (ALPHABETS.filter((alphabet) => alphabet.test(name)).length > 1)
    return "* A name does not mix Latin, Greek and Cyrillic letters.";
  if (name === client.name) return `* You are called ${name} already.`;
  const holder = room.names.get(foldName(name));
  return holder && holder !== client ? `* The name ${name} is taken.` : null;
}

/** Two names with the same folded form are the same: ALICE and alice, Straße and STRASSE. */
const foldName = (name: string) =>
  name.normalize("NFKC").toLowerCase().toUpperCase().toLowerCase().normalize("NFKC");
const roster = (room: Room) =>
  (room.roster ??= `* The room contains: ${room.clients.map(({ name }) => name).join(", ")}`);

/** Lets a client go: it gets what was said up to now, and the notice why, if any; then a FIN. */
function dismiss(room: Room, client: Client, notice?: string): void {
  if (client.phase === "closing") return;
  if (notice) tell(room, client, notice);
  if (client.phase === "joined") send(client, takeShare(client, room.batch));
  removeClient(room, client);
  client.deadline = performance.now() + LOBBY_DEADLINE;
  drain(client);
}

/** Takes a client out of the room, if it is in it, and tells the others that it has left. */
export function removeClient(room: Room, client: Client, why = ""): void {
  const { phase, name } = client;
  client.phase = "closing";
  if (phase !== "joined") return;
  room.clients.splice(room.clients.indexOf(client), 1);
  room.names.delete(foldName(name));
  room.roster = null;
  broadcastMessage(room, `* ${name} has left the chat${why}`);
  room.options.log?.(`Removing user: ${name} from clients${why}`);
}

/** The connection is closed, by whomever. Nothing can be told to this client any more. */
function closed(room: Room, client: Client): void {
  room.connections.delete(client);
  if (client.refusal) return void room.refused--;
  const siblings = (room.addresses.get(client.address) ?? 1) - 1;
  if (siblings > 0) room.addresses.set(client.address, siblings);
  else room.addresses.delete(client.address);
  const lost = countLines(client.unread);
  removeClient(room, client, lost > 0 ? ` (${lost} or more lines unread)` : "");
}

/** Looks once a second for those who take too long to give their name or to close, or are gone. */
function sweep(room: Room): void {
  for (const client of room.connections) {
    if (performance.now() < client.deadline) continue;
    if (client.phase === "naming") dismiss(room, client, "* You gave no name within a minute.");
    else if (client.phase !== "joined" || hasVanished(client.socket)) client.socket.terminate();
    else client.deadline += NO_ANSWER / 10;
  }
}

// While something is on its way keepalive asks nothing, and Linux sends it again for a quarter of an
// hour. So we look ourselves who has not answered for long (struct tcp_info in linux/tcp.h, tcp(7)).
const hasVanished = (() => {
  const [IPPROTO_TCP, TCP_INFO, info] = [6, 11, new DataView(new ArrayBuffer(60))];
  const types = { args: ["int", "int", "int", "buffer", "buffer"], returns: "int" } as const;
  try {
    const { getsockopt } = dlopen("libc.so.6", { getsockopt: types }).symbols;
    return ({ fd = -1 }: Bun.Socket<Client> & { fd?: number }) =>
      getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, Uint32Array.of(info.byteLength)) === 0 &&
      info.getUint8(2) + info.getUint8(3) > 5 && // tcpi_retransmits and tcpi_probes: tries in vain
      info.getUint32(56, true) > NO_ANSWER; // tcpi_last_ack_recv
  } catch {
    return () => false; // another system
  }
})();

// --- The way of a message ----------------------------------------------------------------------

/** Bytes have come, which are lines as far as they end in a newline; or, without any, the FIN. */
function receive(room: Room, client: Client, chunk?: Buffer): void {
  room.received++;
  if (chunk) {
    client.unread = Buffer.concat([client.unread, chunk]);
    release(chunk);
  } else client.finished = true;
  if (!client.heldBack) readLines(room, client);
}

/** Takes as many lines as the rate lets through, and reads on when the rest has been taken. */
function readLines(room: Room, client: Client): void {
  const bytes = client.unread;
  const price = 1000 / (room.options.rate || Infinity); // ms of its time for a message
  const now = performance.now();
  client.usedUntil = Math.max(client.usedUntil, now - BURST);
  let start = 0;
  for (let end; (end = bytes.indexOf(NEWLINE, start)) !== -1; start = end + 1) {
    if (client.phase === "closing") break;
    // A short question may have a long answer: who asks on and on waits for the flush in between.
    if (client.usedUntil + price > now || (client.share?.length ?? 0) > MAX_QUEUE) {
      client.unread = bytes.subarray(start);
      client.heldBack = true;
      client.socket.pause(); // TCP in its turn holds back the sender
      return void setTimeout(readLines, PACE, room, client);
    }
    client.usedUntil += price;
    takeLine(room, client, bytes, start, end);
  }
  // The beginning of a line is kept as a copy: a view would hold the whole chunk.
  const rest = bytes.subarray(start, start + MAX_LINE + 2);
  client.unread = rest.length > 0 ? Buffer.from(rest) : NOTHING;
  release(bytes);
  if (client.heldBack) client.socket.resume();
  client.heldBack = false;
  if (client.finished) dismiss(room, client);
}

/** Frees bytes at once, if that is worth it: tens of megabytes would pile up to be collected. */
function release(bytes: Buffer): void {
  if (bytes.length > MAX_LINE && bytes.buffer instanceof ArrayBuffer) bytes.buffer.transfer(0);
}

/** A line is bytes until it is whole: a character may be split over two packets. */
function takeLine(room: Room, client: Client, bytes: Buffer, start: number, end: number): void {
  if (end > start && bytes[end - 1] === RETURN) end--;
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

// DEL, C0 and C1 controls but tab, the line separators, and what turns the direction of a text
// around (Unicode UAX #9): all that could make a terminal or a reader see what nobody wrote.
const UNCLEAN = /[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;

/** Says a line, without its ending, to everybody in the room but its sender, if it has one. */
export function broadcastMessage(room: Room, line: string, sender?: Client): void {
  if (sender) addToShare(sender, room.batch);
  room.batch += line + "\n";
  if (sender) sender.shared = room.batch.length;
  scheduleFlush(room, sender !== undefined);
}

/** Says a line to one client, after all that it has been sent so far. */
function tell(room: Room, client: Client, line: string): void {
  if (client.phase !== "joined") return send(client, Buffer.from(line + "\n"));
  addToShare(client, room.batch, line + "\n");
  scheduleFlush(room, true);
}

/** Gives a client its own version of the batch up to here, with an answer behind it. */
function addToShare(client: Client, batch: string, answer = ""): string {
  client.share = (client.share ?? "") + batch.slice(client.shared) + answer;
  client.shared = batch.length;
  return client.share;
}

function takeShare(client: Client, batch: string): Buffer {
  const share = addToShare(client, batch);
  [client.share, client.shared] = [null, 0];
  return Buffer.from(share);
}

/** Sees to the next flush, a system call per client: for mere news, a large room rests first. */
function scheduleFlush(room: Room, urgent: boolean): void {
  if (room.nextFlush === "soon" || (room.nextFlush === "later" && !urgent)) return;
  const rest = urgent ? 0 : room.restUntil - performance.now();
  room.nextFlush = rest < 1 ? "soon" : "later";
  if (rest < 1) gather(room);
  else setTimeout(() => room.nextFlush === "later" && scheduleFlush(room, true), rest);
}

/** Lets the loop look at all sockets once a turn; flushes when 8 turns have brought nothing new. */
function gather(room: Room, end = performance.now() + MAX_GATHER, idle = 0, seen = -1): void {
  if (idle === 8 || performance.now() > end) return flush(room);
  setImmediate(gather, room, end, room.received === seen ? idle + 1 : 0, room.received);
}

/** Sends the batch: the very same bytes to all but those who had a part in it. */
function flush(room: Room, limit = MAX_QUEUE): void {
  const started = performance.now();
  const { batch } = room;
  const bytes = Buffer.from(batch);
  room.batch = "";
  room.nextFlush = "none";
  // A copy, because a removal moves the others up. What is said about it goes into the next batch.
  for (const client of [...room.clients]) {
    const lagged = client.queued > 0;
    send(client, client.share === null ? bytes : takeShare(client, batch));
    // One batch may be larger than the limit: only who has not kept up with earlier ones is slow.
    if (!lagged || client.queued <= limit) continue;
    removeClient(room, client, " (too slow)");
    client.socket.terminate();
  }
  room.restUntil = performance.now() + Math.min(performance.now() - started, MAX_REST);
}

/** Hands bytes to the kernel. What it does not take waits in the client's queue for `drain`. */
function send(client: Client, bytes: Uint8Array): void {
  if (bytes.length === 0) return;
  const taken = client.queued > 0 ? 0 : client.socket.write(bytes);
  if (taken < 0 || taken === bytes.length) return; // sent, or closed: `close` will say so
  client.queue.push(bytes.subarray(taken));
  client.queued += bytes.length - taken;
}

/** Sends what waits, now that the kernel may have room; after it the FIN of one who is let go. */
function drain(client: Client): void {
  client.queued = 0;
  for (const bytes of client.queue.splice(0)) send(client, bytes);
  if (client.phase === "closing" && client.queued === 0) client.socket.shutdown(); // end() loses bytes
}

// --- Commands ----------------------------------------------------------------------------------

type Run = (room: Room, client: Client, rest: string) => void;
const COMMANDS: readonly [usage: string, help: string, run: Run][] = [
  ["/help", "shows this list", (room, client) => tell(room, client, HELP)],
  ["/who", "says who is here", (room, client) => tell(room, client, roster(room))],
  ["/nick NAME", "gives you another name", changeName],
  ["/msg NAME TEXT", "says something to one person only", whisper],
  ["/quit", "leaves the room", (room, client) => dismiss(room, client)],
];

const HELP = [...COMMANDS, ["//TEXT", "says /TEXT, for a message that begins with a slash"]]
  .map(([usage, help]) => `* ${usage} ${help}`)
  .join("\n");

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

function changeName(room: Room, client: Client, wish: string): void {
  const name = wish.normalize("NFKC");
  const refusal = refuseName(room, client, name);
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

/**
 * Opens a room, which stays open until `stop()` of the returned handle is called.
 * @throws what Bun.listen throws: with a code such as EADDRINUSE, without one for an unknown host
 */
export function startServer(options: Partial<ServerOptions> = {}) {
  const room = new Room({ ...DEFAULTS, ...options });
  const { host: hostname, port, maxClients, tls = false, logError } = room.options;
  if (!/^(127\.|::1$|localhost$)/.test(hostname)) room.options.maxPerAddress ??= 64;
  // A process out of descriptors can do nothing, not even refuse. Bun has raised the soft limit.
  const report = process.report.getReport() as { userLimits?: { open_files?: { soft?: unknown } } };
  const limit = Number(report.userLimits?.open_files?.soft) || Infinity; // may be "unlimited"
  room.options.maxClients = Math.min(maxClients, Math.max(1, limit - SPARE_SOCKETS));
  const handlers: Bun.SocketHandler<Client> = {
    open: (socket) => handleClient(room, socket),
    handshake: (socket, success) => success && greet(room, socket.data),
    data: (socket, chunk) => receive(room, socket.data, chunk),
    drain: (socket) => drain(socket.data),
    // Who has sent a FIN may still read (`echo hi | nc -N`), and have lines that are held back.
    end: (socket) => receive(room, socket.data),
    close: (socket) => closed(room, socket.data),
    error: (socket, error) => {
      logError?.(error.stack ?? String(error));
      socket.terminate();
    },
  };
  const listen = (port: number) =>
    Bun.listen<Client>({ hostname, port, tls, allowHalfOpen: true, socket: handlers });
  let listener = listen(port);
  const sweeper = setInterval(sweep, 1000, room);
  return {
    port: listener.port,
    maxClients: room.options.maxClients,
    clients: room.clients as readonly Readonly<Pick<Client, "name" | "queued">>[],
    /** Reads the files of the certificate again, for all who come from now on. Throws as above. */
    renewCertificate() {
      listen(0).stop(); // throws before anything has changed
      listener.stop(false);
      listener = listen(listener.port);
    },
    stop: () => stop(room, listener, sweeper), // takes 2.5 s at most
  };
}

/** Delivers what was said, announces the end, and gives everybody two seconds to read it all. */
async function stop(room: Room, listener: Bun.TCPSocketListener<Client>, sweeper: Timer) {
  listener.stop(false);
  clearInterval(sweeper);
  // What clients have sent before is in the kernel: it is all read when a look brings nothing new.
  let deadline = performance.now() + STOP_DEADLINE / 4;
  for (let seen = -1; seen < room.received && performance.now() < deadline; await Bun.sleep(5))
    seen = room.received;
  for (const client of room.clients) {
    const late = countLines(client.unread);
    if (late > 0) tell(room, client, `* Your last lines came too late: ${late} or more.`);
  }
  broadcastMessage(room, SHUTDOWN);
  flush(room, Infinity); // nobody is too slow now: a queue just below its limit has two seconds, too
  room.clients.length = 0;
  for (const client of room.connections) {
    if (client.phase === "naming") tell(room, client, SHUTDOWN);
    client.phase = "closing";
    drain(client);
  }
  deadline = performance.now() + STOP_DEADLINE;
  while (room.connections.size > 0 && performance.now() < deadline) await Bun.sleep(5);
  for (const client of room.connections) client.socket.terminate();
}

// --- The program -------------------------------------------------------------------------------

const OPTIONS = [
  ["host", "HOST", `the address to listen on (${DEFAULTS.host}; 0.0.0.0 for the whole network)`],
  ["port", "PORT", `the port to listen on (${DEFAULTS.port}; 0 takes a free one)`],
  ["rate", "N", `messages a second from one client (${DEFAULTS.rate}; 0 for no limit)`],
  ["max-clients", "N", `connections at a time (${DEFAULTS.maxClients})`],
  ["max-per-address", "N", "connections from one address (64; no limit on loopback)"],
  ["tls-cert", "FILE", "encrypt the room with this certificate (PEM), read again on SIGHUP"],
  ["tls-key", "FILE", "and with this private key (PEM)"],
  ["quiet", "", "print only start, stop and errors"],
  ["help", "", "show this text"],
  ["version", "", "show the version"],
] as const;

const USAGE = `Usage: bun server.ts [options]

Opens a chat room. People enter it with "bun client.ts", or with "nc HOST PORT".

${OPTIONS.map(([name, value, help]) => `  --${name} ${value}`.padEnd(25) + help).join("\n")}`;

export function main(): void {
  const { quiet, ...options } = readOptions();
  const print = createPrinter(process.stdout);
  const logError = createPrinter(process.stderr);
  const server = startServer({ ...options, log: quiet ? undefined : print, logError });
  print(`Server is running on ${endpoint(options.host, server.port)}, waiting for connections...`);
  if (server.maxClients < options.maxClients)
    print(`At most ${server.maxClients} clients: more would need more open files (ulimit -n).`);
  const shutDown = () => {
    // The second signal ends the process at once, as it does where nobody listens to it.
    process.removeAllListeners("SIGINT").removeAllListeners("SIGTERM");
    process.removeAllListeners("SIGHUP").on("SIGHUP", () => {}); // it would open the room again
    print("Server is shutting down");
    // Output that nobody reads may hold up the end, but not for ever.
    void server.stop().then(() => setTimeout(process.exit, STOP_DEADLINE / 5, 0).unref());
  };
  process.on("SIGINT", shutDown).on("SIGTERM", shutDown);
  process.on("uncaughtException", (error) => logError(error.stack ?? String(error))); // of a timer
  if (!options.tls) return;
  process.on("SIGHUP", () => {
    try {
      server.renewCertificate();
      print("The certificate has been read again.");
    } catch (error) {
      logError(`The certificate stays as it was. ${explain(error)}`);
    }
  });
}

/** The options, or their help. @throws TypeError, as parseArgs does, for the one who typed */
function readOptions() {
  const type = (value: string) => ({ type: value ? ("string" as const) : ("boolean" as const) });
  const options = Object.fromEntries(OPTIONS.map(([name, value]) => [name, type(value)]));
  const { values } = parseArgs({ options });
  const { host, quiet, help, version, "tls-cert": cert, "tls-key": key } = values;
  if (help || version) {
    console.log(help ? USAGE : `bun-chat server ${VERSION}`);
    process.exit(0);
  }
  const number = <T>(name: string, least: number, most: number, fallback: T) => {
    const text = values[name];
    if (text === undefined) return fallback;
    if (/^\d+$/.test(`${text}`) && +text >= least && +text <= most) return +text;
    throw new TypeError(`--${name} takes a number from ${least} to ${most}, not "${text}"`);
  };
  if ((cert === undefined) !== (key === undefined))
    throw new TypeError("--tls-cert and --tls-key go together");
  return {
    host: `${host || DEFAULTS.host}`,
    port: number("port", 0, 65_535, DEFAULTS.port),
    rate: number("rate", 0, 1_000_000, DEFAULTS.rate),
    maxClients: number("max-clients", 1, 1_000_000, DEFAULTS.maxClients),
    maxPerAddress: number("max-per-address", 1, 1_000_000, undefined),
    tls: cert !== undefined && { cert: Bun.file(`${cert}`), key: Bun.file(`${key}`) },
    quiet,
  };
}

const PROBLEMS: readonly [code: RegExp, advice: string][] = [
  [/^EADDRINUSE$/, "The port is in use: choose another one with --port."],
  [/^EACCES$/, "That port is for the administrator: choose one above 1023 with --port."],
  [/^E(ADDRNOTAVAIL|NOTFOUND)$|^undefined$/, "This machine has no such address: change --host."],
  [/^ERR_OSSL_.*MISMATCH$/, "The key does not belong to the certificate."],
  [/OSSL|ISDIR|NOENT/, "The certificate or the key is not in PEM, or the key needs a password."],
];

/** What to tell a person: a TypeError is about the options, or a file of them that is empty. */
function explain(error: unknown): string {
  const { code, path, message } = error as NodeJS.ErrnoException;
  if (error instanceof TypeError) return `${message.split(/\.\s/)[0]}. See bun server.ts --help.`;
  if (path !== undefined) return `The file ${path} cannot be read.`;
  return PROBLEMS.find(([pattern]) => pattern.test(`${code}`))?.[1] ?? message;
}

/** Prints lines with the local time, all of a turn at once. What nobody reads is only counted. */
function createPrinter(stream: NodeJS.WriteStream): (line: string) => void {
  let [turn, lost] = ["", 0];
  let waiting = 0; // characters that nobody has read, which Bun does not tell in `writableLength`
  stream.on("error", () => {});
  const write = () => {
    const { length } = turn;
    waiting += length;
    stream.write(turn, () => (waiting -= length));
    turn = "";
  };
  return (line) => {
    if (waiting > MAX_QUEUE) return void lost++;
    if (turn === "") setImmediate(write);
    const time = new Date().toLocaleString("sv"); // Swedish writes 2026-12-31 23:59:59
    if (lost > 0) turn += `${time} (${lost} lines are missing here: nobody read them in time)\n`;
    turn += `${time} ${line}\n`;
    lost = 0;
  };
}

if (import.meta.main) {
  try {
    main();
  } catch (error) {
    console.error(explain(error));
    process.exit(error instanceof TypeError ? 2 : 1);
  }
}
