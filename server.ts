#!/usr/bin/env bun
/**
 * The server of bun-chat: a room that relays each line to everybody else in it.
 *
 *     bun server.ts             opens a room on 127.0.0.1:5555
 *     bun client.ts             enters it, in another terminal
 *     nc 127.0.0.1 5555         enters it from a machine without Bun
 *     bun server.ts --web 8080  opens it to browsers, too, at http://127.0.0.1:8080/
 *
 * The protocol is lines of UTF-8, over TCP or a WebSocket (Budget Chat,
 * https://protohackers.com/problem/3): first a name, then messages, or commands if they begin with
 * "/". Lines of the server begin with "* ".
 *
 * Two ideas carry the rest:
 *
 * - The room is a function of its events: join, say, nick, leave. A line, a closed socket or a timer
 *   only proposes one, and `apply` alone decides what comes of it.
 * - Lines leave together. Whatever arrives at about the same time, from all sockets, becomes one
 *   batch, and each client gets it with one write. So a line costs little even in a large room, and
 *   everybody sees the same lines in the same order.
 *
 * A slow reader gets its own bounded queue, and a fast sender is read from more slowly. Neither
 * holds up anybody else.
 *
 * From top to bottom: limits, state, the entry (`startServer`), text and names, the room and its
 * events, the life of a client, reading, writing, commands, registered names, operators, the history,
 * followers, budgets, browsers, metrics, shutdown, the program, and what touches the operating system
 * by hand.
 */

import { dlopen } from "bun:ffi";
import { Database } from "bun:sqlite";
import { isUtf8 } from "node:buffer";
import { timingSafeEqual } from "node:crypto";
import {
  closeSync,
  fstatSync,
  openSync,
  readFileSync,
  readSync,
  statSync,
  utimesSync,
} from "node:fs";
import { BlockList, isIP } from "node:net";
import { networkInterfaces } from "node:os";
import { resolve } from "node:path";
import { parseArgs } from "node:util";

// --- Limits ------------------------------------------------------------------------------------

const KIB = 1024; // bytes
const MIB = 1024 * KIB;

// Lines, in bytes unless they say otherwise.
const MAX_LINE = 4096; // without the line ending
const MAX_FIRST_LINE = 2 * KIB; // no name takes as many, with its password
const MAX_TYPED_NAME = 128; // UTF-16 code units, before anything looks at it

// Batches, in bytes.
const MAX_BATCH = 256 * KIB; // a batch of this size leaves at once
const MAX_COPIES = 128 * MIB; // and so does one that is as large for all clients together
const MAX_COPY = 64 * KIB; // a client's own batch is copied together up to this size
const SLICE = 16 * KIB; // of lines and answers that are handled per client between two flushes
const MAX_ANSWERS = 4 * MIB; // of answers and rosters for all clients in one turn

// Queues and memory, in bytes.
const SLOW_QUEUE = 1 * MIB; // may wait for a slow reader for as long as it likes
const MAX_QUEUE = 8 * MIB; // may wait for a reader however short the time
const MAX_MEMORY = 256 * MIB; // for all clients together
const MAX_PRIVATE = 16 * KIB; // of one sender's private messages that may wait to be read
const MAX_IGNORED = 8 * MIB; // that a client may still send on its way out
const SMALL_PIECE = 1 * KIB; // smaller pieces that wait in a queue are copied together
const MAX_TAIL = 16 * KIB; // of such pieces at the end of a queue
const PARCEL_OVERHEAD = 352; // about what a parcel takes besides its text
const ENTRY_OVERHEAD = 160; // and what an entry of a queue takes

// Times, in ms.
const LOBBY_DEADLINE = 60_000; // to give a name in
const LEAVER_DEADLINE = 60_000; // to read what is left when leaving
const REFUSED_DEADLINE = 5_000; // to read why one cannot enter
const STOP_DEADLINE = 2_000; // for everybody to read what is left when the server stops
const SLOW_AFTER = 10_000; // that the oldest byte of a long queue may wait
const KEEPALIVE = 45_000; // of silence before the kernel asks whether the peer is still there
const NO_ANSWER = 55_000; // without a sign of life from a peer that cannot be reached
const MAX_GATHER = 1; // that a line may wait for others to leave together with
const MAX_NEWS_DELAY = 50; // that arrivals and departures may wait to be told in a very large room

// The history.
const DEFAULT_RECALL = 20; // lines that /history shows
const MAX_RECALL = 200; // and the most that it shows
const MAX_SEARCH = 1 * MIB; // characters of batches that are searched for them
const HISTORY_MEMORY = 4 * MIB; // bytes of a history that is in no file
const CHECK_MEMORY = 64 * KIB; // characters that are stored between two looks at that memory
const STORE_AGAIN = 1000; // ms until the next try after the history could not be stored
const DAY = 86_400_000; // ms

// Forgetting.
const FORGET_AT_ONCE = 64; // batches that one statement deletes
const FORGET_BYTES = 64 * KIB; // of these batches, not counting the last one
const FORGETTING = 2; // ms that may be spent on it in one turn
const FORGET_MORE = 50; // ms until the next turn
const FORGET_AGAIN = 60_000; // ms until the next try after it has failed
const OVERWRITE = 60_000; // ms at least between two times that the file is cleared of it

// A follower must catch up faster than the room talks.
const MAX_REPLAY = 256 * KIB; // characters that it gets at once
const MAX_REPLAY_BATCHES = 1000; // and batches
const REPLAY_RATE = 2 * MIB; // bytes a second
const REPLAY_BURST = 2_000; // ms' worth of them at once
const BATCH_OVERHEAD = 512; // bytes that a batch counts besides its text

// Registered names.
const MIN_PASSWORD = 8; // characters
const MAX_PASSWORD = 256;
const GUESS_PRICE = 3; // s of credit of an address that a look at a password costs
const MAX_GUESS_CREDIT = 10 * GUESS_PRICE; // so ten at once
const HASHING_RATE = 1; // hashes a second of one address that do not make it wait for the others
const HASHING_BURST = 1000; // ms' worth of them at once
const REGISTER_RATE = 1 / 600; // names a second that one address may register
const REGISTER_BURST = 40 * 60_000; // ms' worth of them in advance: four, beside the next one

// Operators.
const DEFAULT_BAN = 60; // minutes
const MAX_BAN = 525_600; // a year

// The price of work, in short lines: see "Budgets".
const BYTES_PER_UNIT = 512; // of a line: one of 4096 bytes costs 9
const ANSWER_BYTES_PER_UNIT = 4 * KIB; // of an answer, which only one person gets
const IGNORED_BYTES_PER_UNIT = 64 * KIB; // of a line that is too long, which nobody gets
const HISTORY_BYTES_PER_UNIT = 128 * KIB; // of the history, which is not made anew for each answer
const COMING_AND_GOING = 4; // everybody hears of both, and the newcomer gets the roster
const BURST = 10_000; // ms' worth of work that may be done at once
const NEWCOMER_BURST = 2_000; // the same for a connection that has just come
const MIN_WAIT = 100; // ms; the least that a fast sender is held back

// What all people together may say, so that a reader at 8 Mbit/s keeps up with any number of them.
const ROOM_RATE = 768 * KIB; // bytes a second
const ROOM_BURST = 2_000; // ms' worth of them at once
const LINE_OVERHEAD = 30; // bytes of a line besides its text and names

// Where connections per address are limited, all of one address have a common budget.
const DEFAULT_MAX_PER_ADDRESS = 64;
const ADDRESS_SHARE = 4; // times the rate of one connection
const MAX_ARRIVALS = 20; // new connections of one address at once; then one a second

// The event loop.
const TURN = 10; // ms that lines may take in one turn, before others have theirs
const IDLE_TURNS = 8; // without news from any socket, after which a batch leaves
const CLIENTS_PER_TURN = 256; // that leave, or get what has waited, in one turn

// Browsers.
const MAX_FRAME = 16 * KIB; // bytes of lines in one frame of a WebSocket, in both directions
const MAX_PONGS = 64 * KIB; // bytes of answers to pings that may wait for their reader
const PINGS_PER_UNIT = 16; // see "Budgets"
const MAX_PINGS = 10_000; // that may come while nothing should, because they were on their way
const HTTP_DEADLINE = 10; // s of silence before or in a request
const NO_PONG = 60; // s without a sign of life from a browser
const MAX_CUTS = 64; // frames cut from a batch that are kept while it is sent

// Descriptors.
const CHECK_DESCRIPTORS = 100; // ms between two looks at whether they run short
const SPARE_SOCKETS = 64; // descriptors kept free for files and for connections that are being refused
const LAST_SOCKETS = SPARE_SOCKETS / 2; // with which the next ones are not told why, and idle ones end

// --- State -------------------------------------------------------------------------------------

/** What `startServer` can be told. */
export type ServerOptions = {
  host: string;
  port: number; // 0 takes any free one
  rate: number; // short lines a second that one client may send; 0 for no limit at all
  maxClients: number; // connections at a time
  maxPerAddress?: number | undefined; // and from one address; 64, or no limit for this machine only
  tls?: Bun.TLSOptions | false; // certificate and key; without them the room is not encrypted
  db?: string | undefined; // file of the history and the accounts; without it, a history in memory
  keep: number; // days until what was said is forgotten; 0 for never
  operators: readonly string[]; // registered names whose owners may show people out
  web?: number | undefined; // a port for browsers; 0 takes any free one
  webOrigin?: string | undefined; // what browsers call it behind a proxy: https://chat.example.org
  metricsToken?: string | undefined; // with which alone /metrics can be read, from anywhere
  log?: ((event: string) => void) | undefined; // hears of arrivals, messages and departures
  logError?: (problem: string) => void; // hears what went wrong; the chat goes on
};

const DEFAULTS = {
  host: "127.0.0.1",
  port: 5555,
  rate: 10,
  maxClients: 10_000,
  keep: 30,
  operators: [],
};

/** The people in the room: what its events have made of it, and nothing else. */
export class Room {
  people = new Map<number, Person>(); // by the id of the client, in order of coming
  owners = new Map<string, number>(); // the ids of those whose name has a key
}

/** A name, its place in a sorted list, and the keys under which nobody else can have it. */
type Person = { name: string; sortKey: string; keys: readonly string[] };

/** One server. A process may run several, which is how the tests do it. */
class Server {
  room = new Room();
  connections = new Map<number, Client>(); // all: not yet in the room, in it, and on the way out
  clients: Client[] = []; // those in the room, to whom a batch goes
  addresses = new Map<string, Address>(); // where they come from
  nextId = 1;
  refusedCount = 0; // connections that are only told why they cannot enter

  batch = ""; // what the next flush says to everybody
  batchBytes = 0; // its length as UTF-8
  batchLines = 0;
  linesLeftOut = 0; // lines of the batch that one person does not get
  nextFlush: "none" | "later" | "soon" = "none";
  flushes = 0; // so far
  newsNotBefore = 0; // ms; before then no flush only for arrivals and departures
  leavers: Client[] = []; // have left the room; the next flush has their last bytes
  newFollowers: Client[] = []; // they get what they have missed after the next flush
  sliced = new Set<Client>(); // have used up a slice; they are read from after the next flush
  turnDeadline = 0; // ms; what comes later waits for the next turn; 0 between turns
  answerBytes = 0; // of answers and rosters in this turn
  postponed: (() => void)[] = []; // for later turns: FINs, removals, queues with room in the kernel

  inputs = 0; // chunks and FINs so far, which shows whether more are coming
  paidUntil = -Infinity; // ms; see `Account`
  memoryUsed = 0; // bytes that wait to be read by clients, or came from them ahead of the rate

  directory: Person[] = []; // the people in the room, sorted by name
  roster: Piece | null = null; // for a newcomer, without its newline; null while out of date
  whoAnswer: Parcel | null = null; // the answer to /who; likewise

  said: Said[]; // the last lines that people have said, for /history
  saidInBatch: string[] = []; // those in the batch, which have no position yet
  recallForPeople: Recall | null = null; // answers to /history; null while out of date
  recallForFollowers: Recall | null = null;

  tasks: Task[] = []; // that wait for the one that is being done
  isHashing = false; // one is being done
  bans: Ban[] = [];
  operators: Set<string>; // folded names
  operatorLooks: Set<string>;

  constructor(
    readonly options: ServerOptions,
    readonly history: History,
    readonly accounts: Accounts | null, // null: nothing outlives this server
    readonly counts: Counts,
  ) {
    this.said = history.saidBefore(Number.MAX_SAFE_INTEGER, MAX_RECALL).slice(-MAX_RECALL);
    this.operators = new Set(options.operators.map(foldName));
    this.operatorLooks = new Set(options.operators.flatMap(allLooks));
  }
}

/**
 * Where a connection is.
 * - connecting: not greeted yet. The TLS handshake is under way, or too many come from its address.
 * - naming: greeted. Its first line will be its name.
 * - proving: its name is registered, and it waits until its password has been looked at.
 * - joined: in the room.
 * - closing: on its way out. It gets what is queued for it, then our FIN, then it is closed.
 */
type Phase = "connecting" | "naming" | "proving" | "joined" | "closing";

/**
 * Whether a client hears what it says itself, and a mark after each batch: see "Followers".
 * - no: it is a person, or a program that does not care.
 * - asked: it wants to, and gets what it has missed after the next flush.
 * - replaying: it gets what it has missed, as it pays for it.
 * - draining: the same, but its queue must be empty first.
 * - live: it gets each batch and its mark.
 */
type Following =
  | { is: "no" | "live" }
  | { is: "asked"; from: Start }
  | { is: "replaying" | "draining"; until: number }; // the position up to which it has everything

/** Where a replay begins: after a position, or with the last lines that were said before it joined. */
type Start = { position: number } | { lastLines: number };

/** What the room asks of a connection. A TCP socket can do it, and so can a `WebConnection`. */
type Connection = {
  data: Client;
  readonly fd?: number; // of a TCP socket
  write(bytes: Buffer, start: number, length: number): number; // bytes taken; -1 when it is closed
  shutdown(): void; // sends the FIN
  end(): void;
  terminate(): void;
  pause(): void; // until `resume`, nothing is read
  resume(): void;
};

/** Where a connection comes from, and whether others can read it on its way. */
type Peer = {
  host: string; // an IP address
  port: number;
  isLocal: boolean; // it comes from this machine
  isSafe: boolean; // nobody else can read it on its way
};

/** One connection, from accept to close. It is the `socket.data` of its socket. */
class Client {
  phase: Phase = "connecting";
  address: Address | null = null; // null for one that is refused a place
  refusal = ""; // why it is refused a place
  awaitsHandshake = false; // nothing can be said to it before
  deadline = performance.now() + LOBBY_DEADLINE; // ms; then `sweep` looks at it

  unread: Buffer = NOTHING; // the beginning of a line, or lines ahead of the rate
  unreadMemory = 0; // bytes in memory for it
  finReceived = false; // what it sent before may still be unread
  heldBack = false; // no line is read: it is ahead of the rate or of the others, or awaits its turn
  linePaid = false; // the line that it is held back for has been charged
  sliceUsed = 0; // bytes of its lines, and of the answers to them, since the last flush
  ignored = 0; // bytes that it has sent on its way out
  paidUntil = performance.now() - NEWCOMER_BURST; // ms; see `Account`
  share: Account = { paidUntil: -Infinity }; // of what the room may hear

  // null: it gets the whole batch. Otherwise it gets these parts, and then the batch from `ownBatchEnd`.
  ownBatch: Part[] | null = null;
  ownBatchEnd = 0; // bytes of the batch that are in `ownBatch`, or left out of it
  ownPrivates: PrivateDebt[] = []; // private messages in `ownBatch`

  queue: Entry[] = []; // what the kernel has not taken
  queued = 0; // bytes in the queue
  unreadPrivates = 0; // bytes of its own private messages that wait in queues of others

  task: Task | null = null; // until it is done, nothing is read from this client
  following: Following = { is: "no" };
  joinedAfter = 0; // position of the last batch before it joined
  replay: Account = { paidUntil: -Infinity }; // of what it has missed

  constructor(
    readonly id: number,
    readonly socket: Connection,
    readonly peer: Peer,
  ) {}
}

/** What all connections of one address have in common. An IPv6 /64 is one address. */
class Address {
  connections = 0;
  arrivals = MAX_ARRIVALS; // connections that may be greeted at once
  waiting = new Set<Client>(); // connections that are not greeted yet, the first one first
  guessCredit = MAX_GUESS_CREDIT; // s
  hashing: Account = { paidUntil: -Infinity };
  registrations: Account = { paidUntil: -Infinity };
  paidUntil = -Infinity; // ms; see `Account`

  constructor(readonly key: string) {}
}

/** What pays for work with its time: a client, an address, or the room. */
type Account = { paidUntil: number };

/** Bytes for several clients. However many queues they wait in, they are in memory once. */
class Parcel {
  entries = 0; // of queues

  constructor(
    readonly bytes: Buffer,
    readonly isTail = false, // the end of one queue, to which small pieces are appended
  ) {}
}

/** A part of a client's own batch: bytes of the common batch, or what only it is told. */
type Part = { start: number; end: number } | { text: string } | Piece;

/** Bytes of a parcel for one client. */
type Piece = { parcel: Parcel; start: number; end: number };

/** A piece that waits in a queue, since when (ms), and what has been read once it has left. */
type Entry = Piece & { since: number; privates: PrivateDebt[] };

/** A line that somebody has said, and the position of its batch. */
type Said = { at: number; line: string };

/** The last lines that people have said, as an answer, and where in it each of them begins. */
type Recall = { said: Said[]; parcel: Parcel; starts: number[] };

/** Private messages count against their sender until their reader has taken them. */
type PrivateDebt = { sender: Client; bytes: number };

/** Slow work on a client's password. It resolves with what is to be done then. */
type Task = { client: Client; run: () => Promise<() => void> };

/** A name that nobody may have for a while, and the address of the person who had it. */
type Ban = { name: string; keys: readonly string[]; address: string; until: number }; // ms

const NOTHING = Buffer.alloc(0);

// --- The entry ---------------------------------------------------------------------------------

/**
 * Opens a room, which stays open until `stop()` of the returned handle is called.
 * @throws what Bun.listen throws: with a code such as EADDRINUSE, without one for an unknown host;
 *   and what `openHistory` and `openWeb` throw
 */
export function startServer(options: Partial<ServerOptions> = {}) {
  const settings: ServerOptions = { ...DEFAULTS, ...options };
  const { host: hostname, port, maxClients, tls = false } = settings;
  const isOpenToOthers = !isLoopback(hostname) || settings.webOrigin !== undefined;
  if (isOpenToOthers) settings.maxPerAddress ??= DEFAULT_MAX_PER_ADDRESS;
  // Without descriptors a process can do nothing, not even refuse.
  const spare = settings.web === undefined ? SPARE_SOCKETS : 2 * SPARE_SOCKETS;
  settings.maxClients = Math.min(maxClients, Math.max(1, openFilesLimit() - spare));
  const counts = new Counts();
  const logDatabaseError = (problem: string) => {
    counts.databaseErrors++;
    settings.logError?.(problem);
  };
  const history = openHistory({ ...settings, logError: logDatabaseError });
  const accounts = settings.db === undefined ? null : openAccounts(history.database);
  const server = new Server(settings, history, accounts, counts);

  const handlers: Bun.SocketHandler<Client> = {
    open: (socket) => handleSocket(server, socket),
    handshake: (socket, success) => handleHandshake(server, socket.data, success),
    data: (socket, chunk) => handleData(server, socket.data, chunk),
    end: (socket) => handleEnd(server, socket.data),
    drain: (socket) => handleDrain(server, socket.data),
    close: (socket) => handleClose(server, socket.data),
    error: (socket, error) => handleError(server, socket, error),
  };
  const listen = (port: number) =>
    // Half-open, because a client that has sent its FIN may still read: `... | nc -N`.
    Bun.listen<Client>({ hostname, port, tls, allowHalfOpen: true, socket: handlers });

  using undo = new DisposableStack(); // what is to be undone if the start fails
  undo.defer(() => server.history.close());
  let listener = listen(port);
  undo.defer(() => listener.stop());
  const web = settings.web === undefined ? undefined : openWeb(server, settings.web);
  undo.move();

  const sweeper = setInterval(sweep, 1000, server);
  logMissingOperators(server);
  let stopped: Promise<void> | undefined;

  return {
    port: listener.port,
    webPort: web?.port, // for browsers, if they can come in
    maxClients: server.options.maxClients,

    /** Those in the room, with the bytes that wait for each. */
    get clients() {
      return server.clients.map(({ id, queued, socket }) => {
        return { name: nameOf(server.room, id), queued, socket };
      });
    },

    /** Bytes in memory for all clients together. */
    get memoryUsed() {
      return server.memoryUsed;
    },

    /**
     * Reads the files of the certificate again, for all connections from now on.
     * @throws what Bun.listen throws; a bad certificate is found before anything changes
     */
    renewCertificate() {
      listen(0).stop(); // tries the certificate
      listener.stop(false);
      listener = listen(listener.port);
      web?.renewCertificate();
    },

    /**
     * Does what the person at the terminal of the server says, such as "/kick bob".
     * @returns the answer, or "" where there is none but what the room hears
     */
    command: (line: string) => (stopped ? "" : runConsoleCommand(server, line)),

    /** Delivers what was said, tells everybody, and closes. Resolves within three seconds. */
    stop() {
      if (!stopped) {
        web?.stop();
        stopped = stop(server, listener, sweeper);
      }
      return stopped;
    },
  };
}

const LOOPBACK = new BlockList();
LOOPBACK.addSubnet("127.0.0.0", 8);
LOOPBACK.addAddress("::1", "ipv6");

/** Whether an address is of this machine only. */
function isLoopback(host: string): boolean {
  if (isIP(host) === 0) return host.toLowerCase() === "localhost";
  return LOOPBACK.check(host, isIP(host) === 6 ? "ipv6" : "ipv4");
}

/** Whether an address is one of this machine's, on whatever network. */
function isOfThisMachine(host: string): boolean {
  const address = toIpv4(host);
  const own = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? []);
  return isLoopback(address) || own.some((other) => other.address === address);
}

/** The soft limit of open files, which Bun raises when it starts, or Infinity. */
function openFilesLimit(): number {
  const report = process.report.getReport() as { userLimits?: { open_files?: { soft?: unknown } } };
  return Number(report.userLimits?.open_files?.soft) || Infinity; // may be "unlimited"
}

// --- Text and names ----------------------------------------------------------------------------
// Nothing here knows the room. What people send is cleaned, so that neither a terminal nor a reader
// sees what nobody wrote, and names are judged, so that nobody is taken for somebody else.

// DEL, C0 and C1 controls but tab, the line separators, what turns the direction of a text around
// (Unicode UAX #9), and invisible characters that can hide text: the BOM, interlinear annotations and
// tags. Without tags the flags of England, Scotland and Wales become black flags; we accept that.
// Joiners and variation selectors stay: scripts and all other emoji need them.
const UNCLEAN =
  /[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

// What takes no place of its own piles up on the letter before it and covers the lines above: marks,
// what cannot be seen, and the vowels and final consonants of Hangul. Real text has fewer in a row.
const PILE = /[\p{M}\p{DI}\p{Cf}\u1160-\u11ff\ud7b0-\ud7fb]{5,}/gu;
const MAX_PILE = 8; // characters, of which some may have a width, as in Burmese
const MAX_MARKS = 4; // of those that have none
const SPACING = /\p{Mc}/u;
const ASCII = /^[\x20-\x7e]*$/;

/** What people are shown of a text: no controls, and no more than four marks on a letter. */
export function cleanText(text: string): string {
  if (ASCII.test(text)) return text;
  return text.replace(UNCLEAN, "").replace(PILE, thinOut);
}

function thinOut(pile: string): string {
  let marks = 0;
  let kept = "";
  for (const mark of Array.from(pile).slice(0, MAX_PILE)) {
    if (!SPACING.test(mark)) marks++;
    if (marks <= MAX_MARKS || SPACING.test(mark)) kept += mark;
  }
  return kept;
}

/** As a person would type it, with brackets around an IPv6 address (RFC 3986, section 3.2.2). */
function formatEndpoint(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** The first word, and what follows without the blanks around it. */
function splitWord(text: string): { word: string; rest: string } {
  const end = text.search(/\s|$/);
  return { word: text.slice(0, end), rest: text.slice(end).trim() };
}

const NAME_RULE = "* A name is 1 to 32 letters and digits.";
const SCRIPT_RULE = "* A name keeps to letters and digits of one script, with few accents.";

// Letters, marks and digits that can be seen (Unicode UAX #44).
const NAME_PATTERN = /^[[\p{L}\p{Nd}]--\p{DI}][[\p{L}\p{M}\p{Nd}]--\p{DI}]{0,31}$/v;
const TOO_MANY_MARKS = /[\u0300-\u0333]{3}|[\p{Mn}\p{Me}]{5}/u;

// Some scripts cannot do without joiners, which cannot be seen, to tell how letters are joined: after
// a virama in those of India, and between letters of Arabic (Unicode UAX #31, section 2.3).
const JOINERS =
  /(?<=[\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca])[\u200c\u200d](?=\p{L})|(?<=\p{sc=Arabic})\u200c(?=\p{sc=Arabic})/gu;

// The scripts in use today (Unicode UAX #31, tables 5 and 7). Of the first three only the blocks that
// names are written in: the others hold phonetic signs that look like plain letters.
const ALPHABETS = [
  String.raw`[\p{scx=Latin}&&[\u0000-\u02af\u1e00-\u1eff]]`,
  String.raw`[\p{scx=Greek}&&[\u0370-\u03ff\u1f00-\u1fff]]`,
  String.raw`[\p{scx=Cyrillic}&&[\u0400-\u0482\u048a-\u052f]]`,
  String.raw`\p{scx=Armenian}`,
].map((letters) => String.raw`[${letters}--\p{Lm}]`);

const WRITTEN_TOGETHER = [
  String.raw`\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}`,
  String.raw`\p{scx=Han}\p{scx=Hangul}`,
  String.raw`\p{scx=Han}\p{scx=Bopomofo}`,
];

const OTHER_SCRIPTS = `
  Adlam Arabic Balinese Bamum Bassa_Vah Batak Bengali Buginese Buhid Canadian_Aboriginal Chakma Cham
  Cherokee Devanagari Ethiopic Georgian Gujarati Gunjala_Gondi Gurmukhi Hanifi_Rohingya Hanunoo Hebrew
  Javanese Kannada Kayah_Li Khmer Lao Lepcha Limbu Lisu Malayalam Mandaic Masaram_Gondi Meetei_Mayek
  Mende_Kikakui Miao Mongolian Mro Myanmar New_Tai_Lue Newa Nko Nyiakeng_Puachue_Hmong Ol_Chiki Oriya
  Osage Pahawh_Hmong Pau_Cin_Hau Rejang Samaritan Saurashtra Sinhala Sora_Sompeng Sundanese
  Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le Tai_Tham Tai_Viet Tamil Telugu Thaana Thai Tibetan
  Tifinagh Vai Wancho Warang_Citi Yi`
  .trim()
  .split(/\s+/)
  // A modifier letter that belongs to no script, such as the Arabic tatweel, is an ornament.
  .map((script) => String.raw`[\p{scx=${script}}--[\p{Lm}&&\p{sc=Common}]]`);

// Digits 0 to 9 go with every script, and so do accents, but those that strike a letter through.
const ONE_SCRIPT = new RegExp(
  [...ALPHABETS, ...WRITTEN_TOGETHER, ...OTHER_SCRIPTS]
    .map((letters) => String.raw`^[${letters}0-9\u0300-\u0333]+$`)
    .join("|"),
  "v",
);

// What looks alike (Unicode UTS #39, confusables.txt): each group is a letter, two letters or a mark,
// and those that are taken for it. Upper and lower case are apart, because "I" looks like "l", which
// both are "|" here, and "L" does not.
const LOOK_ALIKES = new Map(
  `ǃ:ⵑ 2:Ƨᒿ 3:ƷȜЗӠ 4:Ꮞ 5:Ƽ 6:бᏮ 8:Ȣȣ৪੪ 9:৭੧୨൭ Ɂ:ʔᎮ A:ΑАᎪᗅꓮ AE:ÆӔ B:ΒВᏴᗷꓐ C:СᏟꓚ D:Ꭰᗞᗪꓓ
  Ð:ĐƉ E:ΕЕᎬⴹꓰ F:Ϝᖴꓝ G:ԌᏀᏳꓖ H:ΗНᎻᕼꓧ J:ͿЈᎫᒍꓙ K:ΚКᏦꓗ L:Ꮮᒪꓡ M:ΜϺМᎷᗰꓟ N:Νꓠ
  O:0ΟОՕ\u07c0০ଠ୦ዐⵔꓳ OE:Œ Ɵ:ΘθѲӨᎾᏫⴱ Ø:ⵁ P:ΡРᏢᑭꓑ Q:ⵕ R:ƦᎡᏒᖇꓣ S:ЅՏᏕᏚꓢ T:ΤТᎢꓔ U:Սሀᑌꓴ Ʉ:Ꮜ
  V:Ѵ\u0667\u06f7Ꮩᐯⴸꓦ W:ԜᎳᏔꓪ X:ΧХⵝꓫ Y:ΥУҮᎩᎽꓬ Ɏ:Ұ Z:ΖᏃꓜ a:ɑαа ae:æӕ b:ƄЬƅьᏏᑲᖯꮟ b|:Ы Ƃ:ƃБ
  ƀ:ѢѣҌҍ c:сꮯ d:ԁᏧᑯꓒ dz:ʣ e:еҽ f:քẝ g:ƍɡց h:һհᏂ ɦ:Ᏺ ħ:ћ i:ıɩɪιіᎥꭵ j:ϳј
  |:l1IƖǀΙІӀӏ\u0661\u06f1ⵏꓲ |O:Ю ||:ǁ |s:ʪ |z:ʫ Ɨ:ƚ n:ոռ ƞ:η
  o:οσоօ\u0665\u06f5०੦૦௦౦೦ഠ൦๐໐၀ჿ oe:œ ɵ:ѳөꮎꮻ p:ρр q:ԛգզ r:гꮁ rn:m ɍ:ғ s:ƽѕꮪ ts:ʦ u:ʋυս
  v:νѵꮩ w:ɯѡԝաꮃ x:хᕁᕽ y:ɣʏγуүყỿ ɏ:ұ z:ꮓ Þ:Ϸ ß:βᏰ þ:ƿϸ ĸ:κкꮶ Ɔ:Ͻꓛ Ǝ:ⴺꓱ Ə:Ә Ɛ:ԐᏋ Ʃ:Σⵉ
  ƫ:Ꮏ Ʊ:ᘮᘴ ǝ:əә Ƕ:Ԋ ȝ:ʒӡჳ ȷ:յ ɂ:ꭾ Ʌ:ΛЛ\u0668\u06f8ᐱⴷꓥ ɔ:ͻ ɜ:з ɢ:ԍᏻꮐ ɰ:պሣ ɸ:φф ʀ:ꭱꮢ ʍ:мꮇ
  ʘ:ⵙ ʙ:вᏼ ʜ:нꮋ ӈ:ӊ ʟ:ꮮ Γ:ГᎱᒥ Δ:ᐃⵠ Π:П Φ:ФՓቀ Ψ:Ѱ Ω:ᘯᘵ π:п ς:ϛ ψ:ѱ Ͷ:И Ѡ:Ꮗᗯ Ҷ:Ӌ ҷ:ӌ
  Ո:በᑎꓵ ձ:ኔ Մ:ሆ Ռ:ቡ Ի:ኮ Պ:ጣ ͷ:и τ:тꭲ δ:ծᕷẟ Ͱ:ᎨᎰ ɛ:εєԑꮛ H\u0327:ӇӉ C\u0327:Ҫ c\u0327:ҫ
  e\u0328:ҿ |\u0328:ɭ N\u0327:Ɲ p\u0314:ƥ १:\u0669\u06f9 \u0302:\u0311 \u0303:\u0342 \u0304:\u0305 \u0306:\u030c
  \u0313:\u0315 \u0331:\u0320 \u0327:\u0321\u0326 \u0328:\u0322\u0345`
    .split(/\s+/)
    .flatMap((group) => {
      const [letter = "", alike = ""] = group.split(":");
      return Array.from(alike, (other) => [other, letter] as const);
    }),
);

/**
 * A name as it is kept (Unicode UAX #15). A very long one becomes "", which is no name: to normalize
 * it would take time that grows with the square of its length.
 */
function normalizeName(typed: string): string {
  return typed.length > MAX_TYPED_NAME ? "" : typed.normalize("NFKC");
}

function isName(name: string): boolean {
  return NAME_PATTERN.test(name.replace(JOINERS, ""));
}

/** Two names with the same folded form are the same: ALICE and alice, Straße and STRASSE. */
function foldName(name: string): string {
  const letters = name.replace(JOINERS, "").normalize("NFKC");
  return letters.toLowerCase().toUpperCase().toLowerCase().normalize("NFKC");
}

// A dot above is not seen on letters that have one (Unicode, Soft_Dotted; UTS #39, hidden overlays).
const HIDDEN_DOT = /(?<=[ijıȷɩιіјϳ][\u0316-\u0333]*)\u0307/gu;

/** How a name looks: the same for two names that are taken for each other. */
function lookOf(name: string): string {
  const letters = name.replace(JOINERS, "").normalize("NFD").replace(HIDDEN_DOT, "");
  return foldName(Array.from(letters, lookOfLetter).join(""));
}

function lookOfLetter(letter: string): string {
  const alike = LOOK_ALIKES.get(letter);
  if (alike !== undefined) return alike;

  const isForeignDigit = /[\p{Nd}--[0-9]]/v.test(letter);
  return isForeignDigit ? lookOfLetter(digitValue(letter)) : letter;
}

/** 0 to 9. Decimal digits stand in rows of ten, the zero first (Unicode, section 4.6). */
function digitValue(digit: string): string {
  const code = digit.codePointAt(0) ?? 0;
  let value = 0;
  while (/\p{Nd}/u.test(String.fromCodePoint(code - value - 1))) value++;
  return String(value % 10);
}

/** The key under which a name is found, in whatever case it is written. */
function spellingKey(name: string): string {
  return `= ${foldName(name)}`;
}

/** The keys under which nobody else can have a name: how it is read, how it looks, and in capitals. */
function nameKeys(name: string): string[] {
  return [spellingKey(name), `~ ${lookOf(name)}`, `^ ${lookOf(name.toUpperCase())}`];
}

/** How a name looks as it is typed, in small letters and in capitals: its owner may write it anyhow. */
function allLooks(name: string): [typed: string, small: string, capitals: string] {
  return [lookOf(name), lookOf(name.toLowerCase()), lookOf(name.toUpperCase())];
}

function isSameName(a: string, b: string): boolean {
  return foldName(a) === foldName(b);
}

// --- The room and its events -------------------------------------------------------------------
// `apply` must come to the same result wherever the same events are applied in the same order. So it
// looks at nothing but the room and the event: no clock, no socket, no option.

/** Something that changes the room. */
export type RoomEvent =
  | { type: "join"; clientId: number; name: string }
  | { type: "say"; clientId: number; text: string }
  | { type: "nick"; clientId: number; name: string }
  | { type: "leave"; clientId: number; reason: string };

/** What comes of an event: a line for the room and one for the log, a refusal, or nothing. */
export type Outcome = { heard: string; logged: string } | { refused: string } | null;

/**
 * Applies an event to the room. No other function changes the people in it or what is said.
 * @returns null for an event that has no place in the room any more, such as a line of somebody who
 *   has left
 */
export function apply(room: Room, event: RoomEvent): Outcome {
  const person = room.people.get(event.clientId);
  if (event.type === "join") return person ? null : applyJoin(room, event);
  if (!person) return null;

  const { name } = person;
  switch (event.type) {
    case "say":
      return {
        heard: `[${name}] ${event.text}`,
        logged: `Received message from ${name}: ${event.text}`,
      };

    case "nick": {
      const wanted = createPerson(event.name);
      const refused = checkPerson(room, event.clientId, wanted);
      if (refused) return { refused };

      releaseKeys(room, person);
      addPerson(room, event.clientId, wanted); // where the old name stood
      return {
        heard: `* ${name} is now called ${wanted.name}`,
        logged: `User ${name} is now called ${wanted.name}.`,
      };
    }

    case "leave":
      releaseKeys(room, person);
      room.people.delete(event.clientId);
      return {
        heard: `* ${name} has left the chat${event.reason}`,
        logged: `Removing user: ${name} from clients${event.reason}`,
      };
  }
}

function applyJoin(room: Room, event: { clientId: number; name: string }): Outcome {
  const newcomer = createPerson(event.name);
  const refused = checkPerson(room, event.clientId, newcomer);
  if (refused) return { refused };

  addPerson(room, event.clientId, newcomer);
  return {
    heard: `* ${newcomer.name} has joined the chat`,
    logged: `User ${newcomer.name} has joined the chat.`,
  };
}

/** Somebody with a name, or with something that is none, and then has no keys. */
function createPerson(typedName: string): Person {
  const name = normalizeName(typedName);
  if (!isName(name)) return { name, sortKey: "", keys: [] }; // it may be long, and keys take time

  const sortKey = foldName(name).normalize("NFD"); // é stands between e and f
  return { name, sortKey, keys: nameKeys(name) };
}

function addPerson(room: Room, clientId: number, person: Person): void {
  for (const key of person.keys) room.owners.set(key, clientId);
  room.people.set(clientId, person);
}

function releaseKeys(room: Room, person: Person): void {
  for (const key of person.keys) room.owners.delete(key);
}

/** Why a client cannot be called so, or null if it can. */
function checkPerson(room: Room, clientId: number, { name, keys }: Person): string | null {
  if (!isName(name)) return NAME_RULE;
  const letters = name.replace(JOINERS, "");
  if (!ONE_SCRIPT.test(letters) || TOO_MANY_MARKS.test(letters)) return SCRIPT_RULE;
  if (name === room.people.get(clientId)?.name) return `* You are called ${name} already.`;

  const [sameName, ...sameLooks] = keys.map((key) => room.owners.get(key) ?? clientId);
  if (sameName !== clientId) return `* The name ${name} is taken.`;
  const isTaken = sameLooks.some((owner) => owner !== clientId);
  return isTaken ? `* The name ${name} looks like one that is taken.` : null;
}

function nameOf(room: Room, clientId: number): string {
  return room.people.get(clientId)?.name ?? "";
}

/** The client of that name, in whatever case it is written; undefined if nobody is called so. */
function findClient(server: Server, name: string): Client | undefined {
  const clientId = server.room.owners.get(spellingKey(normalizeName(name)));
  return clientId === undefined ? undefined : server.connections.get(clientId);
}

// --- The life of a client ----------------------------------------------------------------------
// A client goes in one of three ways, and each of them ends in `handleClose`:
//
// - dismiss: it gets what was said so far, perhaps a last line, and then a FIN.
// - drop: at once. What waits for it is lost, and the others hear why.
// - cutOff: it is refused without a word, because too many are being refused.

/** Takes in a TCP connection. Under TLS nothing can be said to it before the handshake. */
function handleSocket(server: Server, socket: Bun.Socket<Client>): void {
  const { remoteAddress: host = "", remotePort: port, localAddress } = socket;
  const isLocal = isLoopback(toIpv4(host)) || host === localAddress;
  const hasTls = Boolean(server.options.tls);
  socket.setKeepAlive(true, KEEPALIVE);
  handleClient(server, socket, { host, port, isLocal, isSafe: isLocal || hasTls }, hasTls);
}

/** Takes in a new connection. */
export function handleClient(
  server: Server,
  socket: Connection,
  peer: Peer,
  awaitsHandshake = false,
): void {
  const client = new Client(server.nextId++, socket, peer);
  socket.data = client;
  if (peer.host === "") {
    socket.terminate(); // it was reset while it waited to be accepted
    return;
  }

  client.awaitsHandshake = awaitsHandshake;
  server.options.log?.(`New connection from ${endpointOf(client)}`);
  server.connections.set(client.id, client);

  givePlace(server, client);
  // The refused use descriptors, too. When they are many, the next ones are not told why.
  if (client.refusal && server.refusedCount > LAST_SOCKETS) cutOff(server, client);
  else if (!client.refusal && !takeArrival(server, client)) waitForArrival(client);
  else if (!awaitsHandshake) greetOrRefuse(server, client);
}

/** As it stands in the log. */
function endpointOf({ peer }: Client): string {
  return formatEndpoint(peer.host, peer.port);
}

/** Counts a connection, or finds out why there is no place for it. */
function givePlace(server: Server, client: Client): void {
  const { maxClients, maxPerAddress = Infinity } = server.options;
  const address = findAddress(server, client.peer.host);
  const total = server.connections.size - server.refusedCount; // this one among them

  if (total > maxClients) {
    client.refusal = "* The server is full. Try again later.";
  } else if (address.connections >= maxPerAddress) {
    client.refusal = "* Too many connections from your address.";
  }

  if (client.refusal) {
    server.refusedCount++;
  } else {
    address.connections++;
    client.address = address;
  }
}

function cutOff(server: Server, client: Client): void {
  logRefusal(server, client, client.refusal);
  client.phase = "closing";
  client.socket.end();
}

function handleHandshake(server: Server, client: Client, success: boolean): void {
  client.awaitsHandshake = false;
  if (client.phase === "closing") return;
  if (success) greetOrRefuse(server, client);
  else logRefusal(server, client, "the TLS handshake failed");
}

/** Says the first line to a client, now that something can be said to it. */
function greetOrRefuse(server: Server, client: Client): void {
  if (client.refusal) {
    dismiss(server, client, client.refusal);
    logRefusal(server, client, client.refusal);
  } else {
    client.phase = "naming";
    tell(server, client, "Welcome to bun-chat! What is your name?");
  }
}

/**
 * Proposes a change of the room, and tells everybody concerned what comes of it. This server is the
 * only one, so its order is the order of the room, and the event is applied at once.
 */
function propose(server: Server, client: Client, event: RoomEvent): void {
  const before = server.room.people.get(client.id);
  const outcome = apply(server.room, event);
  if (outcome === null) return;
  if ("refused" in outcome) {
    refuse(server, client, event, outcome.refused);
    return;
  }

  // Before anything is said: a full batch leaves at once, and may drop clients.
  const after = server.room.people.get(client.id);
  if (event.type !== "say") updateDirectory(server, before, after);

  let logged = outcome.logged;
  switch (event.type) {
    case "say":
      rememberSaid(server, outcome.heard);
      broadcastMessage(server, outcome.heard, client);
      break;
    case "join":
      enterRoom(server, client, outcome.heard);
      logged += ` From ${endpointOf(client)}`;
      break;
    case "nick":
    case "leave":
      server.roster = null;
      broadcastMessage(server, outcome.heard);
      break;
  }
  server.options.log?.(logged);
}

/**
 * A newcomer whose name is refused has to go: the next line of a bot would be taken for a name. The log
 * gets the reason, not the line that was sent: that may hold a password.
 */
function refuse(
  server: Server,
  client: Client,
  { type }: RoomEvent,
  why: string,
  logged = why,
): void {
  if (type !== "join") {
    tell(server, client, why);
    return;
  }
  dismiss(server, client, why);
  logRefusal(server, client, logged);
}

/** A newcomer gets the roster at once, and of the batch what comes after its own announcement. */
function enterRoom(server: Server, client: Client, announcement: string): void {
  const others = server.roster ?? createRoster(server.room, client.id);
  server.roster = extendRoster(others, nameOf(server.room, client.id));
  sendTogether(server, client, [others, LINE_END]);
  server.answerBytes += others.end;
  charge(server, client, COMING_AND_GOING);

  client.phase = "joined";
  client.joinedAfter = server.history.position;
  client.ownBatch = [];
  client.ownBatchEnd = server.batchBytes + Buffer.byteLength(announcement) + 1; // behind it
  server.clients.push(client);
  broadcastMessage(server, announcement);
}

const ROSTER = "* The room contains: ";
const LINE_END = wholeOf(new Parcel(Buffer.from("\n")));

/** All names but the newcomer's, in order of coming. */
function createRoster(room: Room, newcomerId: number): Piece {
  const others = Array.from(room.people).filter(([clientId]) => clientId !== newcomerId);
  return wholeOf(new Parcel(Buffer.from(ROSTER + others.map(([, { name }]) => name).join(", "))));
}

/**
 * Writes a name behind a roster, which stays as it is for newcomers that still wait for it. So a
 * thousand rosters of a thousand newcomers are one in memory.
 */
function extendRoster({ parcel, end }: Piece, name: string): Piece {
  const more = Buffer.from(end === ROSTER.length ? name : `, ${name}`);
  const newEnd = end + more.length;
  let { bytes } = parcel;
  if (newEnd <= bytes.length) {
    more.copy(bytes, end);
    return { parcel, start: 0, end: newEnd };
  }

  bytes = Buffer.alloc(2 * newEnd);
  parcel.bytes.copy(bytes, 0, 0, end);
  more.copy(bytes, end);
  return { parcel: new Parcel(bytes), start: 0, end: newEnd };
}

/** Keeps the directory sorted. To sort it for each /who would take long, with a /nick before each. */
function updateDirectory(server: Server, before?: Person, after?: Person): void {
  const { directory } = server;
  if (before) directory.splice(findPlace(directory, before), 1);
  if (after) directory.splice(findPlace(directory, after), 0, after);
  server.whoAnswer = null;
}

/** The place of a person in a sorted list, or where it belongs: a binary search. */
function findPlace(sorted: readonly Person[], { sortKey }: Person): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const isBefore = (sorted[middle]?.sortKey ?? "") < sortKey;
    if (isBefore) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Lets a client go: it gets what was said up to now, and a last line if there is one; then a FIN. */
function dismiss(server: Server, client: Client, lastLine = "", reason = ""): void {
  if (client.phase === "closing") return;
  if (lastLine) tell(server, client, lastLine);

  const wasJoined = client.phase === "joined";
  if (wasJoined) {
    extendOwnBatch(client, server.batchBytes);
    server.leavers.push(client);
  }
  removeClient(server, client, reason);
  client.deadline = performance.now() + (wasJoined ? LEAVER_DEADLINE : REFUSED_DEADLINE);
  if (client.heldBack) resume(client); // what it still sends is thrown away, but not its FIN
  finishWriting(client);
}

/** Marks a client as closing. If it was in the room, it leaves it, and the others are told. */
export function removeClient(server: Server, client: Client, reason = ""): void {
  if (client.phase === "closing") return;
  client.phase = "closing";

  // Their order does not matter, and moving all others up would take long when thousands leave.
  const place = server.clients.indexOf(client);
  const last = place === -1 ? undefined : server.clients.pop();
  if (last && last !== client) server.clients[place] = last;
  propose(server, client, { type: "leave", clientId: client.id, reason });
}

/** Ends somebody's stay. It is told why, and the others hear the reason. */
function showOut(server: Server, client: Client, why: string, reason: string): void {
  tellTooLate(server, client);
  dismiss(server, client, why, ` (${reason})`);
}

/** Tells somebody that lines which were not read will not be said any more. */
function tellTooLate(server: Server, client: Client): void {
  const lines = countUnread(client.unread);
  if (lines > 0) tell(server, client, `* Your last lines came too late: ${lines} or more.`);
  else if (client.heldBack && hearsBatches(client))
    tell(server, client, "* Your last lines may have come too late.");
}

const TOO_SLOW = " (too slow)";

/** Cuts a client off. What waits for it is lost, and the others hear why. */
function drop(server: Server, client: Client, reason: string): void {
  if (reason === TOO_SLOW) server.counts.slow++;
  removeClient(server, client, reason);
  discard(server, client);
  client.socket.terminate();
}

/** The connection is closed, by whomever. Nothing can be told to this client any more. */
function handleClose(server: Server, client: Client): void {
  if (!server.connections.delete(client.id)) return;
  if (client.refusal) server.refusedCount--;
  if (client.address) {
    client.address.connections--;
    client.address.waiting.delete(client);
  }

  const unreadLines = countUnread(client.unread);
  discard(server, client);
  const reason = unreadLines > 0 ? ` (${unreadLines} or more lines unread)` : "";
  // Until that turn it stays in the room, which is harmless: writes to its socket return -1.
  postpone(server, client, () => removeClient(server, client, reason));
}

/** Does some work in a later turn. Thousands leaving at once, for instance, must not stall the room. */
function postpone(server: Server, client: Client, work: () => void): void {
  if (server.postponed.length === 0) setImmediate(runPostponed, server);
  server.postponed.push(() => serve(server, client, work));
}

function runPostponed(server: Server): void {
  endTurn(server);
  const due = server.postponed.slice(0, CLIENTS_PER_TURN);
  for (const work of due) work();
  server.postponed.splice(0, due.length); // only now, so that `postpone` sees that a turn is coming
  endTurn(server); // others may have sent something in the meantime
  if (server.postponed.length > 0) setImmediate(runPostponed, server);
}

/** Frees what waits for a client, and what has come from it and was not read. */
function discard(server: Server, client: Client): void {
  for (const entry of client.queue) dropEntry(server, entry);
  client.queue = [];
  client.queued = 0;
  client.ownBatch = null;
  server.sliced.delete(client);
  keepUnread(server, client, NOTHING);
}

/** An exception in a handler of a socket costs this client only. */
function handleError(server: Server, socket: { terminate(): void }, error: unknown): void {
  server.options.logError?.(describe(error));
  socket.terminate();
}

/** Does work for a connection. An exception ends this one only. */
function serve(
  server: Server,
  { socket }: { socket: { terminate(): void } },
  work: () => void,
): void {
  try {
    work();
  } catch (error) {
    handleError(server, socket, error);
  }
}

/** Once a second: forgets, gives back credit, ends bans, and looks for clients that take too long. */
function sweep(server: Server): void {
  forgetOld(server);
  for (const address of server.addresses.values()) sweepAddress(server, address);
  void doTasks(server);

  const now = performance.now();
  server.bans = server.bans.filter(({ until }) => until > now);
  for (const client of server.connections.values()) {
    serve(server, client, () => checkClient(server, client, now));
  }
  dropGreediest(server);
}

function checkClient(server: Server, client: Client, now: number): void {
  if (isSlow(client, now)) drop(server, client, TOO_SLOW);
  else if (now >= client.deadline) handleDeadline(server, client);
}

function handleDeadline(server: Server, client: Client): void {
  switch (client.phase) {
    case "connecting":
      logRefusal(server, client, "it did not finish the TLS handshake within a minute");
      drop(server, client, "");
      break;
    case "naming": {
      const why =
        client.unread.length > 0
          ? "* Your name did not end with a newline within a minute."
          : "* You gave no name within a minute.";
      dismiss(server, client, why);
      logRefusal(server, client, why);
      break;
    }
    case "proving": // has no deadline: it is we who take the time
      break;
    case "joined": // every 5.5 s, from the first minute on
      if (hasVanished(client.socket)) client.socket.terminate();
      else client.deadline += NO_ANSWER / 10;
      break;
    case "closing":
      client.socket.terminate();
      break;
  }
}

function logRefusal(server: Server, client: Client, why: string): void {
  countRefusal(server, why);
  server.options.log?.(`Refused ${endpointOf(client)}: ${why.replace(/^\* /, "")}`);
}

// --- Reading -----------------------------------------------------------------------------------

const NEWLINE = 10;
const RETURN = 13;
const TLS_HANDSHAKE = 0x16; // the first byte of a TLS hello (RFC 8446, section 5.1)

function handleData(server: Server, client: Client, chunk: Buffer): void {
  server.inputs++;
  server.counts.bytesIn += chunk.length;
  if (client.phase === "closing") {
    ignore(client, chunk);
    return;
  }

  if (client.unread.length === 0) {
    keepUnread(server, client, chunk);
  } else {
    keepUnread(server, client, Buffer.concat([client.unread, chunk]));
    detach(chunk);
  }
  if (!client.heldBack) readLines(server, client);
  else if (client.unread.length > SLICE) client.socket.pause(); // it waits for something, and listens
  dropGreediest(server);
}

/** Throws away what comes from a client on its way out, but not for ever. */
function ignore(client: Client, chunk: Buffer): void {
  client.ignored += chunk.length;
  detach(chunk);
  if (client.ignored > MAX_IGNORED) client.socket.terminate();
}

/** The FIN has come. A client that is held back may have sent lines before. */
function handleEnd(server: Server, client: Client): void {
  server.inputs++;
  client.finReceived = true;
  postpone(server, client, () => {
    const isOpen = server.connections.has(client.id);
    const isWaiting = client.address?.waiting.has(client);
    if (isOpen && !client.heldBack) readLines(server, client);
    else if (isOpen && isWaiting && !client.unread.includes(NEWLINE)) dismiss(server, client);
  });
}

/** Takes as many lines as may be taken now. The rest is taken when the client may go on. */
function readLines(server: Server, client: Client): void {
  const bytes = client.unread;
  const { flushes } = server;
  let start = 0;

  // A TLS hello may hold newlines, and text that a web page chose. No part of it must be a line.
  if (client.phase === "naming" && bytes[0] === TLS_HANDSHAKE) {
    dismiss(server, client);
    logRefusal(server, client, "it speaks TLS");
  }

  while (client.phase !== "closing") {
    const newline = bytes.indexOf(NEWLINE, start);
    if (newline === -1) break;
    const end = newline > start && bytes[newline - 1] === RETURN ? newline - 1 : newline;

    // Its slice is used up, or the time of this turn. Or a full batch has left in the midst of its
    // lines, which takes long.
    const isOver = client.sliceUsed > SLICE || server.flushes !== flushes || isTurnOver(server);
    const line = bytes.subarray(start, end);
    const isTooMuch = server.answerBytes > MAX_ANSWERS && mayGetLongAnswer(client, line);
    if (isOver || isTooMuch) {
      holdBack(server, client, bytes.subarray(start));
      waitForTurn(server, client);
      return;
    }
    const wait = payForLine(server, client, line);
    if (wait > 0) {
      holdBack(server, client, bytes.subarray(start));
      readOnAfter(wait, server, client);
      return;
    }

    takeLine(server, client, bytes, start, end);
    start = newline + 1;
    if (client.following.is === "asked") {
      holdBack(server, client, bytes.subarray(start)); // until it has what it has missed
      return;
    }
    if (client.task !== null) {
      waitForTask(server, client, bytes.subarray(start));
      return;
    }
  }

  readBeginning(server, client, bytes.subarray(start));
  detach(bytes);
  if (client.finReceived && !client.heldBack) dismiss(server, client);
}

/** Whether the lines of this turn, which begins with the first of them, have taken long enough. */
function isTurnOver(server: Server): boolean {
  const now = performance.now();
  if (server.turnDeadline === 0) {
    server.turnDeadline = now + TURN;
    setImmediate(endTurn, server);
  }
  return now > server.turnDeadline;
}

function endTurn(server: Server): void {
  server.turnDeadline = 0;
  server.answerBytes = 0;
}

/** Whether a line may get a long answer: a name, or a command that is not /msg, /nick or /quit. */
function mayGetLongAnswer({ phase }: Client, line: Buffer): boolean {
  return phase === "naming" || /^\/[^mnq/]/i.test(line.toString("latin1", 0, 2));
}

/** Newcomers come in the next turn. What others are told must leave first. */
function waitForTurn(server: Server, client: Client): void {
  if (client.phase === "naming") {
    postpone(server, client, () => readOn(server, client));
  } else {
    server.sliced.add(client);
    scheduleFlush(server, true);
  }
}

/** The beginning of a line is kept, but no more of it than shows that it is too long. */
function readBeginning(server: Server, client: Client, beginning: Buffer): void {
  if (client.phase === "naming" && beginning.length > MAX_FIRST_LINE) {
    dismiss(server, client, NAME_RULE);
    logRefusal(server, client, NAME_RULE);
  }

  // A copy: a view would keep the whole chunk in memory.
  const kept = client.phase === "closing" ? NOTHING : beginning.subarray(0, MAX_LINE + 2);
  keepUnread(server, client, kept.length > 0 ? Buffer.from(kept) : NOTHING);

  const ignored = beginning.length - (MAX_LINE + 2);
  if (client.phase !== "joined" || ignored <= 0) return;
  const wait = charge(server, client, ignored / IGNORED_BYTES_PER_UNIT);
  if (wait === 0) return;
  pause(client);
  readOnAfter(wait, server, client);
}

/** Stops reading from a client. TCP in its turn holds back the sender. */
function holdBack(server: Server, client: Client, rest: Buffer): void {
  keepRest(server, client, rest);
  pause(client);
}

/** Keeps lines until a task is done, but goes on listening: a FIN shows that nobody waits for it. */
function waitForTask(server: Server, client: Client, rest: Buffer): void {
  keepRest(server, client, rest);
  client.heldBack = true;
  if (rest.length > SLICE) client.socket.pause();
}

function keepRest(server: Server, client: Client, rest: Buffer): void {
  // A view keeps its whole chunk in memory: copy when little is left of it.
  if (rest.length < client.unreadMemory / 2) keepUnread(server, client, Buffer.from(rest));
  else keepUnread(server, client, rest, client.unreadMemory);
}

function readOnAfter(wait: number, server: Server, client: Client): void {
  setTimeout(readOn, Math.max(wait, MIN_WAIT), server, client);
}

/** Goes on with a client that was held back. */
function readOn(server: Server, client: Client): void {
  serve(server, client, () => {
    if (client.phase === "closing") return;
    client.heldBack = false;
    readLines(server, client);
    if (!client.heldBack) client.socket.resume();
  });
}

function pause(client: Client): void {
  client.heldBack = true;
  client.socket.pause();
}

function resume(client: Client): void {
  client.heldBack = false;
  client.socket.resume();
}

/** Keeps bytes for later. `memory` is more than their length where they are a view. */
function keepUnread(server: Server, client: Client, bytes: Buffer, memory = bytes.length): void {
  server.memoryUsed += memory - client.unreadMemory;
  client.unread = bytes;
  client.unreadMemory = memory;
}

/** Frees a large buffer at once: tens of megabytes would pile up to be collected. */
function detach(bytes: Buffer): void {
  if (bytes.length > MAX_LINE && bytes.buffer instanceof ArrayBuffer) bytes.buffer.transfer(0);
}

/** A line is bytes until it is whole: a character may be split over two packets. */
function takeLine(server: Server, client: Client, bytes: Buffer, start: number, end: number): void {
  client.sliceUsed += end - start + 1;
  server.counts.linesIn++;
  if (client.phase === "naming") {
    // No name and password are longer, and the end of a request must not be cut off.
    const line = end - start > MAX_LINE ? "" : bytes.toString("utf8", start, end);
    proposeName(server, client, "join", splitLogin(line));
    return;
  }
  if (end - start > MAX_LINE) {
    tell(server, client, `* Your message was longer than ${MAX_LINE} bytes and was not sent.`);
    confirmAnswer(server, client);
    return;
  }

  // The raw line decides: to take out an invisible character must not make a command of it.
  const typed = bytes.toString("utf8", start, end);
  const line = cleanText(typed);
  if (typed.startsWith("/") && !typed.startsWith("//")) {
    runCommand(server, client, line);
    if (client.task === null) confirmAnswer(server, client);
  } else if (/\S/.test(line)) {
    const text = typed.startsWith("//") ? line.slice(1) : line;
    propose(server, client, { type: "say", clientId: client.id, text });
  }
}

/** Counts whole lines, but not beyond a hundred: half a megabyte may be nothing but newlines. */
function countUnread(bytes: Buffer): number {
  let lines = 0;
  let newline = bytes.indexOf(NEWLINE);
  while (newline !== -1 && lines < 100) {
    lines++;
    newline = bytes.indexOf(NEWLINE, newline + 1);
  }
  return lines;
}

// --- Writing -----------------------------------------------------------------------------------
// The way of a line:
//
//     broadcastMessage  ->  batch     \
//                                      flush  ->  sendBatch  ->  send  ->  queue  ->  sendQueue
//     tell              ->  ownBatch  /

/** Says a line, without its ending, to everybody in the room but its sender, if it has one. */
export function broadcastMessage(server: Server, line: string, sender?: Client): void {
  const isLeftOut = sender?.following.is === "no"; // a follower hears itself
  if (isLeftOut) extendOwnBatch(sender, server.batchBytes);
  server.batch += line + "\n";
  server.batchBytes += Buffer.byteLength(line) + 1;
  server.batchLines++;
  if (isLeftOut) {
    sender.ownBatchEnd = server.batchBytes;
    server.linesLeftOut++; // `flush` counts all lines for everybody
  }

  const copies = server.batchBytes * server.clients.length;
  if (server.batchBytes >= MAX_BATCH || copies >= MAX_COPIES) flush(server);
  else scheduleFlush(server, sender !== undefined);
}

/** Says a line to one client, after all that it has been sent so far. */
function tell(server: Server, client: Client, line: string): void {
  server.counts.linesOut += line.split("\n").length;
  const text = `${line}\n`;
  if (client.phase !== "joined") {
    send(server, client, wholeOf(new Parcel(Buffer.from(text))));
    return;
  }

  const parts = extendOwnBatch(client, server.batchBytes);
  const last = parts.at(-1);
  if (last && "text" in last) last.text += text;
  else parts.push({ text });
  scheduleFlush(server, true);
}

/** Gives a client a batch of its own, with all of the common batch up to `end` that it should get. */
function extendOwnBatch(client: Client, end: number): Part[] {
  client.ownBatch ??= [];
  if (hearsBatches(client)) {
    if (client.ownBatchEnd < end) client.ownBatch.push({ start: client.ownBatchEnd, end });
    client.ownBatchEnd = end;
  }
  return client.ownBatch;
}

/** Sees to the next flush. In a large room, arrivals and departures wait for a while. */
function scheduleFlush(server: Server, urgent: boolean): void {
  if (server.nextFlush === "soon" || (server.nextFlush === "later" && !urgent)) return;

  const delay = urgent ? 0 : server.newsNotBefore - performance.now();
  if (delay >= 1) {
    server.nextFlush = "later";
    setTimeout(flushNews, delay, server);
  } else {
    server.nextFlush = "soon";
    gather(server, performance.now() + MAX_GATHER, 0, -1);
  }
}

function flushNews(server: Server): void {
  if (server.nextFlush === "later") scheduleFlush(server, true);
}

/** Lets the loop look at all sockets once a turn, and flushes when they bring nothing new. */
function gather(server: Server, deadline: number, idleTurns: number, inputs: number): void {
  // A full batch has left in the meantime. If another has begun, the first of two loops flushes it.
  if (server.nextFlush !== "soon") return;

  if (idleTurns === IDLE_TURNS || performance.now() > deadline) {
    flush(server);
    return;
  }
  const turns = server.inputs === inputs ? idleTurns + 1 : 0;
  setImmediate(gather, server, deadline, turns, server.inputs);
}

/** Sends everybody the same bytes, except clients that have a batch of their own. */
function flush(server: Server): void {
  const started = performance.now();
  const { batch: text, batchBytes: end, leavers } = server;

  countLines(server);

  // Whatever fails below, the next line begins a new batch.
  server.batch = "";
  server.batchBytes = 0;
  server.batchLines = 0;
  server.linesLeftOut = 0;
  server.nextFlush = "none";
  server.flushes++;
  server.leavers = [];

  // It is stored before anybody gets it: what was heard is never forgotten.
  const mark = text === "" ? "" : storeBatch(server, text);
  const parcel = new Parcel(Buffer.from(text + mark));
  const unmarked = { parcel, start: 0, end };
  const marked = wholeOf(parcel); // for followers
  for (const client of leavers)
    serve(server, client, () => queueLastBatch(server, client, unmarked));
  sendToLeavers(server, leavers);

  // Iterate over a copy: an exception may remove a client.
  for (const client of [...server.clients]) {
    const batch = client.following.is === "live" ? marked : unmarked;
    try {
      sendBatch(server, client, batch); // not by `serve`, whose closures would cost a few percent
    } catch (error) {
      handleError(server, client.socket, error);
    }
  }
  if (parcel.entries === 0) detach(parcel.bytes);
  startReplays(server);

  const now = performance.now();
  server.newsNotBefore = now + Math.min(now - started, MAX_NEWS_DELAY);
  server.counts.flushTimes.add((now - started) / 1000);
  dropFullQueues(server);
  dropGreediest(server);
  if (server.sliced.size > 0) setImmediate(readOnAll, server); // the loop looks at others first
}

function sendBatch(server: Server, client: Client, batch: Piece): void {
  client.sliceUsed = 0; // a flush begins a new slice
  if (client.ownBatch === null) {
    if (hearsBatches(client)) send(server, client, batch);
    return;
  }

  extendOwnBatch(client, batch.end);
  sendTogether(server, client, takeOwnBatch(client, batch.parcel));
  countPrivates(client);
}

/** What a leaver should still get waits in its queue until it has its turn. */
function queueLastBatch(server: Server, client: Client, batch: Piece): void {
  for (const piece of takeOwnBatch(client, batch.parcel)) enqueue(server, client, piece);
  countPrivates(client);
}

/** Sends the last bytes and our FIN to some leavers a turn: thousands at once would take long. */
function sendToLeavers(server: Server, leavers: Client[]): void {
  for (const client of leavers.splice(0, CLIENTS_PER_TURN))
    serve(server, client, () => sendQueue(server, client));
  if (leavers.length > 0) setImmediate(sendToLeavers, server, leavers);
}

/** Reads on from clients that had used up a slice, the first one first, in a turn of their own. */
function readOnAll(server: Server): void {
  endTurn(server);

  // Iterate over a copy: a client may use up another slice.
  for (const client of [...server.sliced]) {
    server.sliced.delete(client);
    readOn(server, client);
    if (isTurnOver(server)) break;
  }

  endTurn(server);
  if (server.sliced.size > 0) scheduleFlush(server, true); // which comes back here
}

/** The pieces of a client's own batch. From here on it gets the next batch as everybody else. */
function takeOwnBatch(client: Client, batch: Parcel): Piece[] {
  const parts = client.ownBatch ?? [];
  client.ownBatch = null;
  client.ownBatchEnd = 0;
  return parts.map((part) => toPiece(part, batch));
}

function toPiece(part: Part, batch: Parcel): Piece {
  if ("text" in part) return wholeOf(new Parcel(Buffer.from(part.text)));
  return "parcel" in part ? part : { parcel: batch, start: part.start, end: part.end };
}

function wholeOf(parcel: Parcel): Piece {
  return { parcel, start: 0, end: parcel.bytes.length };
}

/** Sends some pieces. Small ones are copied together, for the sake of a single write. */
function sendTogether(server: Server, client: Client, pieces: Piece[]): void {
  let size = 0;
  for (const { start, end } of pieces) size += end - start;
  if (pieces.length <= 1 || size > MAX_COPY) {
    for (const piece of pieces) send(server, client, piece);
    return;
  }

  let copied = 0;
  for (const { parcel, start, end } of pieces)
    copied += parcel.bytes.copy(scratch, copied, start, end);
  const sent = client.queue.length > 0 ? 0 : write(server, client, scratch, 0, size);
  if (sent === size || sent < 0) return; // a closed socket says so in `close`
  enqueue(server, client, wholeOf(new Parcel(Buffer.from(scratch.subarray(sent, size)))));
}

const scratch = Buffer.allocUnsafe(MAX_COPY);

/** Sends bytes. What the kernel does not take waits in the client's queue for `drain`. */
function send(server: Server, client: Client, piece: Piece): void {
  const { parcel, start, end } = piece;
  const size = end - start;
  if (size === 0) return;
  const sent = client.queue.length > 0 ? 0 : write(server, client, parcel.bytes, start, size);
  if (sent === size || sent < 0) return; // a closed socket says so in `close`
  enqueue(server, client, { parcel, start: start + sent, end });
}

/** Hands bytes to the kernel. @returns how many it has taken; less than 0 when the socket is closed */
function write(
  server: Server,
  client: Client,
  bytes: Buffer,
  start: number,
  length: number,
): number {
  const sent = client.socket.write(bytes, start, length);
  if (sent > 0) server.counts.bytesOut += sent;
  return sent;
}

/** Adds to a client's queue. Small pieces become one entry, because each one costs a write later. */
function enqueue(server: Server, client: Client, piece: Piece): void {
  const size = piece.end - piece.start;
  client.queued += size;

  const last = client.queue.at(-1);
  if (last && size <= SMALL_PIECE && last.end - last.start + size <= MAX_TAIL) {
    append(server, last, piece);
    return;
  }
  retain(server, piece.parcel);
  client.queue.push({ ...piece, since: performance.now(), privates: [] });
}

/** Copies a piece behind an entry, which first gets a parcel with space when it has none. */
function append(server: Server, entry: Entry, piece: Piece): void {
  const used = entry.end - entry.start;
  const size = piece.end - piece.start;

  if (!entry.parcel.isTail || entry.end + size > entry.parcel.bytes.length) {
    const capacity = Math.min(MAX_TAIL, 2 * (used + size));
    const tail = new Parcel(Buffer.allocUnsafe(capacity), true);
    entry.parcel.bytes.copy(tail.bytes, 0, entry.start, entry.end);
    retain(server, tail);
    release(server, entry.parcel);
    entry.parcel = tail;
    entry.start = 0;
    entry.end = used;
  }

  piece.parcel.bytes.copy(entry.parcel.bytes, entry.end, piece.start, piece.end);
  entry.end += size;
}

function retain(server: Server, parcel: Parcel): void {
  if (parcel.entries === 0) server.memoryUsed += parcel.bytes.length + PARCEL_OVERHEAD;
  parcel.entries++;
  server.memoryUsed += ENTRY_OVERHEAD;
}

function release(server: Server, parcel: Parcel): void {
  server.memoryUsed -= ENTRY_OVERHEAD;
  parcel.entries--;
  if (parcel.entries === 0) server.memoryUsed -= parcel.bytes.length + PARCEL_OVERHEAD;
}

/** The kernel may have room again. Postponed, because it may have room for thousands at once. */
function handleDrain(server: Server, client: Client): void {
  postpone(server, client, () => sendQueue(server, client));
}

/** Sends what waits. */
function sendQueue(server: Server, client: Client): void {
  let done = 0;
  for (const entry of client.queue) {
    const { parcel, start, end } = entry;
    const sent = write(server, client, parcel.bytes, start, end - start);
    if (sent < 0) return; // closed, and `close` will say so
    client.queued -= sent;
    entry.start += sent;
    if (entry.start < end) break;
    done++;
  }
  for (const entry of client.queue.splice(0, done)) dropEntry(server, entry);
  finishWriting(client);
  if (client.following.is === "draining") replayMoreLater(server, client);
}

/** An entry has left a queue. */
function dropEntry(server: Server, { parcel, privates }: Entry): void {
  release(server, parcel);
  for (const { sender, bytes } of privates) sender.unreadPrivates -= bytes;
}

/** Sends the FIN of a client on its way out, after all that it should get. */
function finishWriting(client: Client): void {
  if (client.phase !== "closing" || client.queue.length > 0 || client.ownBatch !== null) return;
  client.socket.shutdown(); // end() would lose what the kernel has not sent yet
}

/** Whether a long queue has waited for too long. A short one may wait for ever. */
function isSlow(client: Client, now: number): boolean {
  const [oldest] = client.queue;
  return oldest !== undefined && client.queued > SLOW_QUEUE && now - oldest.since > SLOW_AFTER;
}

/** Drops those for whom too much waits, however short the time. */
function dropFullQueues(server: Server): void {
  const slow = server.clients.filter((client) => client.queued > MAX_QUEUE);
  for (const client of slow) drop(server, client, TOO_SLOW);
}

/** Drops the clients that take most memory, until all clients together do not take too much. */
function dropGreediest(server: Server): void {
  if (server.memoryUsed <= MAX_MEMORY) return;

  const memoryOf = ({ queued, unreadMemory }: Client) => queued + unreadMemory;
  const clients = Array.from(server.connections.values());
  clients.sort((a, b) => memoryOf(b) - memoryOf(a));
  for (const client of clients) {
    if (server.memoryUsed <= MAX_MEMORY || memoryOf(client) === 0) break;
    drop(server, client, client.queued > 0 ? TOO_SLOW : " (too fast)");
  }
}

// --- Commands ----------------------------------------------------------------------------------

/** A command, and what runs it for its caller, a client or an operator. */
type Command<Caller> = {
  name: string;
  parameters: string;
  help: string;
  /** `rest` is what follows the name, without the blanks around it. */
  run(server: Server, caller: Caller, rest: string): void;
  takesPassword?: true; // then `rest` is all that follows the first blank, with its blanks
};

const COMMANDS: readonly Command<Client>[] = [
  { name: "/help", parameters: "", help: "shows this list", run: sendHelp },
  { name: "/who", parameters: "", help: "says who is here", run: sendNames },
  {
    name: "/nick",
    parameters: "NAME",
    help: "gives you another name (/nick NAME PASSWORD, if it is registered)",
    run: changeName,
    takesPassword: true,
  },
  {
    name: "/msg",
    parameters: "NAME TEXT",
    help: "says something to one person only",
    run: sendPrivate,
  },
  {
    name: "/register",
    parameters: "PASSWORD",
    help: "makes your name your own",
    run: register,
    takesPassword: true,
  },
  {
    name: "/password",
    parameters: "NEW",
    help: "changes its password",
    run: changePassword,
    takesPassword: true,
  },
  { name: "/unregister", parameters: "", help: "gives the name up", run: unregister },
  {
    name: "/history",
    parameters: "N",
    help: `shows the last N lines that were said (${DEFAULT_RECALL}; at most ${MAX_RECALL})`,
    run: sendHistory,
  },
  {
    name: "/since",
    parameters: "POSITION",
    help: "is for programs that must not miss a line: see README.md",
    run: follow,
  },
  { name: "/quit", parameters: "", help: "leaves the room", run: quit },
];

function findCommand<Caller>(commands: readonly Command<Caller>[], word: string) {
  const name = word.toLowerCase();
  return commands.find((command) => command.name === name);
}

function runCommand(server: Server, client: Client, line: string): void {
  const { word, rest } = splitWord(line);
  const command = findCommand(COMMANDS, word);
  if (command) {
    command.run(server, client, command.takesPassword ? line.slice(word.length + 1) : rest);
    return;
  }

  const forOperators = isOperator(server, client)
    ? findCommand(OPERATOR_COMMANDS, word)
    : undefined;
  if (forOperators) forOperators.run(server, operatorOf(server, client), rest);
  else answer(server, client, `* Unknown command ${word}. Try /help.`);
}

/** Tells a client what it has asked for, which costs by its size. */
function answer(server: Server, client: Client, line: string): void {
  tell(server, client, line);
  chargeAnswer(server, client, Buffer.byteLength(line));
}

/** What a command is for, as a line. */
function describeCommand(command: { name: string; parameters: string; help: string }): string {
  const { name, parameters, help } = command;
  return parameters ? `* ${name} ${parameters} ${help}` : `* ${name} ${help}`;
}

function sendHelp(server: Server, client: Client): void {
  const commands = isOperator(server, client) ? [...COMMANDS, ...OPERATOR_COMMANDS] : COMMANDS;
  const help = commands.map(describeCommand);
  help.push("* //TEXT says /TEXT, for a message that begins with a slash");
  answer(server, client, help.join("\n"));
}

/** All get the same answer until somebody comes, goes or is renamed. */
function sendNames(server: Server, client: Client): void {
  server.whoAnswer ??= new Parcel(Buffer.from(listPeople(server)));
  const parcel = server.whoAnswer;
  extendOwnBatch(client, server.batchBytes).push(wholeOf(parcel));
  scheduleFlush(server, true);
  server.counts.linesOut++;
  chargeAnswer(server, client, parcel.bytes.length);
}

function listPeople({ directory }: Server): string {
  const are = directory.length === 1 ? "person is" : "people are";
  return `* ${directory.length} ${are} here: ${directory.map(({ name }) => name).join(", ")}\n`;
}

function changeName(server: Server, client: Client, rest: string): void {
  const { name, password } = splitLogin(rest.trimStart());
  if (name === "") answer(server, client, "* Say it like this: /nick NAME");
  else proposeName(server, client, "nick", { name: name.trim(), password }); // blanks may follow
}

/** A private message is for two, and therefore neither an event of the room nor in the log. */
function sendPrivate(server: Server, client: Client, rest: string): void {
  const { word: name, rest: text } = splitWord(rest);
  if (text === "") {
    answer(server, client, "* Say it like this: /msg NAME TEXT");
    return;
  }
  const reader = findClient(server, name);
  if (!reader) {
    answer(server, client, `* Nobody here is called ${name}.`);
    return;
  }
  if (client.unreadPrivates > MAX_PRIVATE) {
    answer(server, client, "* Your private messages are not being read. This one was not sent.");
    return;
  }

  const { room } = server;
  const line = `[${nameOf(room, client.id)} -> ${nameOf(room, reader.id)}] ${text}`;
  answer(server, client, line);
  if (reader === client) return;
  tell(server, reader, line);
  reader.ownPrivates.push({ sender: client, bytes: Buffer.byteLength(line) });
}

/** Counts private messages that still wait in the reader's queue against their senders. */
function countPrivates(reader: Client): void {
  if (reader.ownPrivates.length === 0) return;
  const last = reader.queue.at(-1);
  if (last) {
    last.privates.push(...reader.ownPrivates);
    for (const { sender, bytes } of reader.ownPrivates) sender.unreadPrivates += bytes;
  }
  reader.ownPrivates = [];
}

function quit(server: Server, client: Client): void {
  dismiss(server, client);
}

// --- Registered names --------------------------------------------------------------------------
// With --db, people can make a name their own: an account is a name and a hash of its password. Nobody
// else gets that name, or one that looks like it. So a person in the room under a registered name has
// proved its password, or has registered it there.
//
// A hash takes some 40 ms and 19 MB. Hashes run on Bun's thread pool, one at a time: several would
// starve the other work there. Meanwhile nothing is read from the client.

type Accounts = ReturnType<typeof openAccounts>;

// Argon2id with the least memory (KiB) and time that OWASP recommends ("Password Storage Cheat Sheet").
const HASHING = { algorithm: "argon2id", memoryCost: 19_456, timeCost: 2 } as const;

const NAMES_UNKNOWN = "* The registered names cannot be looked up now. Try again later.";
const IN_MEMORY_ONLY =
  "* This room forgets everything when it stops. One that keeps names is started like this: bun server.ts --db chat.sqlite";
const UNSAFE =
  "* Passwords are taken only under TLS, or on the machine of the server: others could read them on their way.";
const PASSWORD_RULE = `* A password has ${MIN_PASSWORD} to ${MAX_PASSWORD} characters.`;

// The end of the first line of an HTTP request (RFC 9112, section 3). No password ends so, or else a web
// page could enter under the name GET.
const REQUEST = / HTTP\/\d(?:\.\d)?$/;

/**
 * What is known of a name.
 * - free: anybody can have it.
 * - alike: it looks like a registered one.
 * - unknown: the accounts cannot be read.
 * - registered: it has an owner.
 */
type Standing = { is: "free" | "alike" | "unknown" } | { is: "registered"; hash: string };

/** A name and, where one was given, its password. */
type Login = { name: string; password: string | undefined };

/** The password is all that follows the first blank. Blanks alone are none. */
function splitLogin(text: string): Login {
  const blank = text.search(/[ \t]/);
  const password = blank === -1 ? "" : text.slice(blank + 1);
  if (!/\S/.test(password)) return { name: text, password: undefined };
  return { name: text.slice(0, blank), password };
}

/** A password as it is hashed: however it was typed, on whatever keyboard (Unicode UAX #15). */
function normalizePassword(typed: string): string {
  return cleanText(typed).normalize("NFC");
}

/** The accounts in a database. All functions throw what SQLite throws. */
function openAccounts(database: Database) {
  const statements = {
    select: database.query<{ hash: string }, [name: string]>(
      "SELECT hash FROM accounts WHERE name = ?",
    ),
    selectAlike: database.query<{ name: string }, [string, string, string, string]>(
      "SELECT name FROM looks WHERE look IN (?, ?, ?) AND name <> ? LIMIT 1",
    ),
    insert: database.query<null, [name: string, hash: string]>(
      "INSERT INTO accounts (name, hash) VALUES (?, ?)",
    ),
    insertLook: database.query<null, [look: string, name: string]>(
      "INSERT OR IGNORE INTO looks (look, name) VALUES (?, ?)",
    ),
    update: database.query<null, [hash: string, name: string]>(
      "UPDATE accounts SET hash = ? WHERE name = ?",
    ),
    remove: database.query<null, [name: string]>("DELETE FROM accounts WHERE name = ?"),
  };

  function insert(name: string, hash: string): void {
    statements.insert.run(foldName(name), hash);
    for (const look of allLooks(name)) statements.insertLook.run(look, foldName(name));
  }

  return {
    /** The hash of a name's password, or undefined for one that is not registered. */
    find: (name: string) => statements.select.get(foldName(name))?.hash,

    /** Whether a name looks like another one that is registered. */
    hasAlike: (name: string) =>
      statements.selectAlike.get(...allLooks(name), foldName(name)) !== null,

    add: (name: string, hash: string) => database.transaction(insert).immediate(name, hash),
    change: (name: string, hash: string) => statements.update.run(hash, foldName(name)),
    remove: (name: string) => statements.remove.run(foldName(name)),
  };
}

function lookUp(server: Server, typedName: string): Standing {
  const name = normalizeName(typedName);
  if (!server.accounts || !isName(name)) return { is: "free" };
  try {
    if (server.accounts.hasAlike(name)) return { is: "alike" };
    const hash = server.accounts.find(name);
    return hash === undefined ? { is: "free" } : { is: "registered", hash };
  } catch (error) {
    server.options.logError?.(`The registered names cannot be read: ${reasonOf(error)}.`);
    return { is: "unknown" };
  }
}

/** Proposes a name for a client, which must be free, or proved by its password. */
function proposeName(
  server: Server,
  client: Client,
  type: "join" | "nick",
  { name, password }: Login,
): void {
  const event = { type, clientId: client.id, name };
  const standing = lookUp(server, name);

  if (password === undefined || isNameOf(server, client, name)) {
    const why = checkUnproved(server, client, event, standing) ?? checkBan(server, client, event);
    if (why === null) propose(server, client, event);
    else refuse(server, client, event, why);
  } else if (REQUEST.test(password)) {
    refuse(server, client, event, NAME_RULE);
  } else if (!client.peer.isSafe) {
    refuse(server, client, event, UNSAFE);
  } else if (standing.is === "registered") {
    proveName(server, client, event, standing.hash, password);
  } else {
    // What seems to be the name may be the password, so the log does not have it.
    const why = explainUnregistered(event, standing);
    refuse(server, client, event, why, "it gave a password for a name that is not registered");
  }
}

type NameEvent = { type: "join" | "nick"; clientId: number; name: string };

/** Why a client cannot have a name without a password, or null if it can. */
function checkUnproved(
  server: Server,
  client: Client,
  event: NameEvent,
  standing: Standing,
): string | null {
  const name = normalizeName(event.name);
  switch (standing.is) {
    case "registered":
      if (isNameOf(server, client, name)) return null; // in other letters
      return client.peer.isSafe ? explainRegistered(event) : explainUnsafe(name);
    case "alike":
      return `* The name ${name} looks like one that is registered.`;
    case "unknown":
      return NAMES_UNKNOWN;
    case "free":
      if (client.peer.isLocal || !isKeptForOperator(server, name)) return null;
      return `* The name ${name} is kept for an operator, who registers it on the machine of the server.`;
  }
}

/** Whether a client has this name already, in whatever letters. */
function isNameOf({ room }: Server, client: Client, name: string): boolean {
  return isSameName(normalizeName(name), nameOf(room, client.id));
}

function explainUnsafe(name: string): string {
  return `* The name ${name} is registered, and passwords are taken only under TLS, or on the machine of the server.`;
}

function explainRegistered({ type, name: typedName }: NameEvent): string {
  const name = normalizeName(typedName);
  return type === "join"
    ? `* The name ${name} is registered. Enter it with its password: ${name} PASSWORD`
    : `* The name ${name} is registered. Take it with its password: /nick ${name} PASSWORD`;
}

/** Why a name that came with a password cannot be had: it has none. */
function explainUnregistered({ type, name: typedName }: NameEvent, { is }: Standing): string {
  const name = normalizeName(typedName);
  if (is === "unknown") return NAMES_UNKNOWN;
  if (!isName(name)) return NAME_RULE;
  const how = type === "join" ? `Enter it alone: ${name}` : `Take it alone: /nick ${name}`;
  return `* The name ${name} is not registered, so it has no password. ${how}`;
}

/** Lets a client have a name if the password is right. */
function proveName(
  server: Server,
  client: Client,
  event: NameEvent,
  hash: string,
  password: string,
): void {
  if (client.phase === "naming") client.phase = "proving";
  addTask(server, client, async () => {
    const typed = normalizePassword(password);
    const isRight = await isPasswordOf(typed, hash);
    const strongerHash = isRight && isWeak(hash) ? await hashPassword(typed) : null;

    return () => {
      const standing = lookUp(server, event.name); // somebody may have changed it in the meantime
      if (standing.is !== "registered") {
        refuse(server, client, event, explainUnregistered(event, standing));
        return;
      }
      if (!isRight || standing.hash !== hash) {
        refuse(server, client, event, explainRegistered(event));
        return;
      }
      addGuessCredit(client, GUESS_PRICE); // it was no guess
      if (strongerHash) changeAccounts(server, ({ change }) => change(event.name, strongerHash));
      takeOver(server, client, event);
    };
  });
}

/** Whether a client has sent its FIN, and no line behind its password. */
function hasGivenUp({ finReceived, unread }: Client): boolean {
  return finReceived && !unread.includes(NEWLINE);
}

/** The name may be in use, by somebody with the same password: that connection ends. */
function takeOver(server: Server, client: Client, event: NameEvent): void {
  const why = checkBan(server, client, event);
  if (why !== null) {
    refuse(server, client, event, why);
    return;
  }

  const other = findClient(server, event.name);
  if (other && hasGivenUp(client)) {
    dismiss(server, client); // it would only throw out the other, and leave
    return;
  }
  if (other && other !== client)
    showOut(server, other, "* You have come in from elsewhere.", "came in from elsewhere");
  propose(server, client, event);
}

/** A hash that cannot be read fits no password. */
async function isPasswordOf(password: string, hash: string): Promise<boolean> {
  try {
    return await Bun.password.verify(password, hash);
  } catch {
    return false;
  }
}

function hashPassword(password: string): Promise<string> {
  return Bun.password.hash(password, HASHING);
}

/** Whether a hash was made with less work than those of today. */
function isWeak(hash: string): boolean {
  const [, memory, time] = /^\$argon2id\$v=19\$m=(\d+),t=(\d+),/.exec(hash) ?? [];
  return !(Number(memory) >= HASHING.memoryCost && Number(time) >= HASHING.timeCost);
}

function register(server: Server, client: Client, typed: string): void {
  const name = nameOf(server.room, client.id);
  const check = () => checkRegistration(server, client, name);
  hashNewPassword(server, client, typed, "/register PASSWORD", check, (hash) => {
    const problem = changeAccounts(server, ({ add }) => add(name, hash));
    if (problem !== null) return problem;

    if (client.address && sharesBudget(server))
      spend(client.address.registrations, 1, REGISTER_RATE, REGISTER_BURST);
    server.options.log?.(`The name ${name} has been registered.`);
    return explainNewAccount(name);
  });
}

function changePassword(server: Server, client: Client, typed: string): void {
  const name = nameOf(server.room, client.id);
  const check = () => checkRegistered(server, name);
  hashNewPassword(server, client, typed, "/password NEW", check, (hash) => {
    const problem = changeAccounts(server, ({ change }) => change(name, hash));
    return problem ?? `* The password of ${name} is changed.`;
  });
}

/**
 * Hashes a new password, and tells the client what came of it.
 * @param check says why the name cannot have it, or null; asked before the hash is made and again after
 * @param store keeps the hash. It returns what to answer.
 */
function hashNewPassword(
  server: Server,
  client: Client,
  typed: string,
  usage: string,
  check: () => string | null,
  store: (hash: string) => string,
): void {
  const password = normalizePassword(typed);
  const why = checkPassword(server, client, password, usage) ?? check();
  if (why !== null) {
    answer(server, client, why);
    return;
  }

  addTask(server, client, async () => {
    const hash = await hashPassword(password);
    return () => answer(server, client, check() ?? store(hash));
  });
}

function explainNewAccount(name: string): string {
  return `* The name ${name} is registered now. Enter it with its password: ${name} PASSWORD`;
}

/** Why a password cannot be taken, or null if it can. */
function checkPassword(
  server: Server,
  client: Client,
  password: string,
  usage: string,
): string | null {
  const characters = Array.from(password).length;
  if (!server.accounts) return IN_MEMORY_ONLY;
  if (!client.peer.isSafe) return UNSAFE;
  if (!/\S/.test(password)) return `* Say it like this: ${usage}`;
  if (characters < MIN_PASSWORD || characters > MAX_PASSWORD) return PASSWORD_RULE;
  return REQUEST.test(password) ? "* A password does not end like that." : null;
}

/** Why a client cannot register its name, or null if it can. */
function checkRegistration(server: Server, client: Client, name: string): string | null {
  const { is } = lookUp(server, name);
  if (is === "unknown") return NAMES_UNKNOWN;
  if (is === "alike") return `* The name ${name} looks like one that is registered.`;
  if (is === "registered")
    return `* The name ${name} is registered already. /password NEW changes its password.`;

  const hasRegisteredMany = (client.address?.registrations.paidUntil ?? 0) > performance.now();
  return hasRegisteredMany
    ? "* Too many names were registered from your address. Try again in ten minutes."
    : null;
}

/** Why a name that should be registered cannot be dealt with, or null if it can. */
function checkRegistered(server: Server, name: string): string | null {
  if (!server.accounts) return IN_MEMORY_ONLY;
  const { is } = lookUp(server, name);
  if (is === "unknown") return NAMES_UNKNOWN;
  return is === "registered" ? null : `* The name ${name} is not registered.`;
}

function unregister(server: Server, client: Client): void {
  const name = nameOf(server.room, client.id);
  // The next person under that name could register it and become an operator.
  const why = isOperator(server, client)
    ? "* Operators keep their names, until the server is started without them."
    : checkRegistered(server, name);
  const problem = why ?? changeAccounts(server, ({ remove }) => remove(name));
  if (problem === null) server.options.log?.(`The name ${name} is not registered any more.`);
  answer(server, client, problem ?? `* The name ${name} is not registered any more.`);
}

/** Changes the accounts. @returns why that could not be done, or null */
function changeAccounts(server: Server, change: (accounts: Accounts) => void): string | null {
  const { accounts, history, options } = server;
  if (!accounts) return IN_MEMORY_ONLY;
  try {
    change(accounts);
    return null;
  } catch (error) {
    const reason = reasonOf(error);
    options.logError?.(`The registered names cannot be changed: ${reason}.`);
    return `* That could not be stored: ${reason}.`;
  } finally {
    history.keepStamp();
  }
}

/** Queues slow work for a client. Nothing is read from it until that is done. */
function addTask(server: Server, client: Client, run: Task["run"]): void {
  client.task = { client, run };
  server.tasks.push(client.task);
  void doTasks(server);
}

/** Does the tasks that may be done now, one at a time. */
async function doTasks(server: Server): Promise<void> {
  if (server.isHashing) return;
  server.isHashing = true;
  let task = takeTask(server);
  while (task) {
    await doTask(server, task);
    task = takeTask(server);
  }
  server.isHashing = false;
}

/**
 * Takes the next task that its address can pay for. The one of the address for which least was done
 * comes first, and one of a client that may have gone comes last.
 */
function takeTask(server: Server): Task | undefined {
  server.tasks = server.tasks.filter(({ client }) => isThere(server, client));

  let next: Task | undefined;
  for (const task of server.tasks) {
    const isAffordable = (task.client.address?.guessCredit ?? 0) >= GUESS_PRICE;
    if (isAffordable && (!next || rankOf(task) < rankOf(next))) next = task;
  }
  if (!next) return undefined;

  server.tasks.splice(server.tasks.indexOf(next), 1);
  addGuessCredit(next.client, -GUESS_PRICE);
  if (next.client.address) spend(next.client.address.hashing, 1, HASHING_RATE, HASHING_BURST);
  return next;
}

/** Whether a client is neither on its way out nor gone. When many go, each leaves in a later turn. */
function isThere(server: Server, { id, phase }: Client): boolean {
  return phase !== "closing" && server.connections.has(id);
}

/** The lower, the sooner. */
function rankOf({ client }: Task): number {
  const { paidUntil } = client.address?.hashing ?? { paidUntil: 0 };
  return hasGivenUp(client) ? Infinity : Math.max(paidUntil, performance.now() - HASHING_BURST);
}

function addGuessCredit({ address }: Client, seconds: number): void {
  if (address) address.guessCredit = Math.min(MAX_GUESS_CREDIT, address.guessCredit + seconds);
}

/** Does a task, and reads on from its client. An exception disconnects this client only. */
async function doTask(server: Server, { client, run }: Task): Promise<void> {
  try {
    const finish = await run();
    client.task = null;
    if (!isThere(server, client)) return;
    finish();
    confirmAnswer(server, client);
    readOn(server, client);
  } catch (error) {
    handleError(server, client.socket, error);
  }
}

// --- Operators ---------------------------------------------------------------------------------
// Operators can show people out: the owners of the names in --operators, and the person at the terminal
// of the server. A name of an operator that nobody has registered yet can be had only on the machine of
// the server, because whoever registers it is an operator.

/** Somebody who may show people out, and gets the answers. */
type Operator = { name: string; answer(line: string): void };

const OPERATOR_COMMANDS: readonly Command<Operator>[] = [
  { name: "/kick", parameters: "NAME REASON", help: "shows somebody out", run: kick },
  {
    name: "/ban",
    parameters: "NAME MINUTES",
    help: `shows somebody out, and keeps them out (${DEFAULT_BAN} minutes)`,
    run: ban,
  },
  { name: "/bans", parameters: "", help: "says who is kept out", run: listBans },
  { name: "/unban", parameters: "NAME", help: "lets somebody in again", run: unban },
];

const CONSOLE_COMMANDS: readonly Command<Operator>[] = [
  { name: "/help", parameters: "", help: "shows this list", run: sendConsoleHelp },
  { name: "/who", parameters: "", help: "says who is here", run: sendConsoleNames },
  ...OPERATOR_COMMANDS,
  { name: "/say", parameters: "TEXT", help: "says something to everybody", run: say },
];

/** Says what is to be done for operators that have no account. */
function logMissingOperators(server: Server): void {
  for (const name of server.options.operators) {
    const { is } = lookUp(server, name);
    if (is === "free")
      server.options.log?.(
        `The operator ${name} is not registered yet: enter as ${name} on this machine, and say /register PASSWORD.`,
      );
    if (is === "alike")
      server.options.log?.(
        `The operator ${name} cannot be registered: the name looks like one that is.`,
      );
  }
}

/** Whether a name that nobody has registered is an operator's, or looks like one. */
function isKeptForOperator(server: Server, name: string): boolean {
  if (server.operators.size === 0 || !isName(name)) return false;
  return allLooks(name).some((look) => server.operatorLooks.has(look));
}

function isOperator(server: Server, client: Client): boolean {
  const name = nameOf(server.room, client.id);
  return server.operators.has(foldName(name)) && lookUp(server, name).is === "registered";
}

function operatorOf(server: Server, client: Client): Operator {
  return {
    name: nameOf(server.room, client.id),
    answer: (line) => answer(server, client, line),
  };
}

/** Does what the person at the terminal of the server says. @returns the answer */
function runConsoleCommand(server: Server, typed: string): string {
  const { word, rest } = splitWord(cleanText(typed).trim());
  const answers: string[] = [];
  const operator: Operator = { name: "the server", answer: (line) => answers.push(line) };

  const command = findCommand(CONSOLE_COMMANDS, word);
  if (command) command.run(server, operator, rest);
  else if (word.startsWith("/")) operator.answer(`* Unknown command ${word}. Try /help.`);
  else if (word) operator.answer("* What is typed here is a command. To talk, say /say TEXT.");
  return answers.join("\n");
}

function sendConsoleHelp(_: Server, operator: Operator): void {
  operator.answer(CONSOLE_COMMANDS.map(describeCommand).join("\n"));
}

function sendConsoleNames(server: Server, operator: Operator): void {
  operator.answer(listPeople(server).trimEnd());
}

/** Says something as the server. */
function say(server: Server, operator: Operator, text: string): void {
  if (text === "") operator.answer("* Say it like this: /say TEXT");
  else announce(server, text);
}

function announce(server: Server, text: string): void {
  broadcastMessage(server, `* The server says: ${text}`);
  server.options.log?.(`The server says: ${text}`);
}

/** The client that an operator names, or undefined, of which the operator is told. */
function findNamed(server: Server, operator: Operator, name: string): Client | undefined {
  const client = findClient(server, name);
  if (!client) operator.answer(`* Nobody here is called ${name}.`);
  return client;
}

function kick(server: Server, operator: Operator, rest: string): void {
  const { word: name, rest: reason } = splitWord(rest);
  if (name === "") {
    operator.answer("* Say it like this: /kick NAME REASON");
    return;
  }
  const client = findNamed(server, operator, name);
  if (!client) return;

  const how = `kicked by ${operator.name}${reason && `: ${reason}`}`;
  showOut(server, client, `* You were ${how}`, how);
}

function ban(server: Server, operator: Operator, rest: string): void {
  const { word: name, rest: typedMinutes } = splitWord(rest);
  const minutes = readMinutes(typedMinutes);
  if (name === "" || minutes === null) {
    operator.answer(`* Say it like this: /ban NAME MINUTES, with 1 to ${MAX_BAN} minutes`);
    return;
  }
  const client = findNamed(server, operator, name);
  if (client) banClient(server, operator, client, minutes);
}

/** The minutes of a ban, or null if they make no sense. */
function readMinutes(typed: string): number | null {
  if (typed === "") return DEFAULT_BAN;
  const minutes = /^\d{1,6}$/.test(typed) ? Number(typed) : 0;
  return minutes >= 1 && minutes <= MAX_BAN ? minutes : null;
}

/** Bans a name and its address. An address of this machine is never banned: many may share it. */
function banClient(server: Server, operator: Operator, client: Client, minutes: number): void {
  const { name = "", keys = [] } = server.room.people.get(client.id) ?? {};
  const isOfMany = client.peer.isLocal || isOfThisMachine(client.peer.host);
  const address = isOfMany ? "" : (client.address?.key ?? "");
  const until = performance.now() + minutes * 60_000;
  server.bans.push({ name, keys, address, until });

  const how = `banned by ${operator.name} for ${formatMinutes(minutes)}`;
  showOut(server, client, `* You were ${how}`, how);
}

function formatMinutes(minutes: number): string {
  return minutes === 1 ? "1 minute" : `${minutes} minutes`;
}

/** How long a ban still lasts. */
function formatTimeLeft({ until }: Ban): string {
  return formatMinutes(Math.max(1, Math.ceil((until - performance.now()) / 60_000)));
}

function listBans(server: Server, operator: Operator): void {
  const bans = server.bans.map((ban) => {
    const address = ban.address && `from ${ban.address} `;
    return `* ${ban.name} ${address}is banned for another ${formatTimeLeft(ban)}`;
  });
  operator.answer(bans.join("\n") || "* Nobody is banned.");
}

function unban(server: Server, operator: Operator, name: string): void {
  const ban = server.bans.find((ban) => isSameName(ban.name, normalizeName(name)));
  if (!ban) {
    operator.answer(name ? `* ${name} is not banned.` : "* Say it like this: /unban NAME");
    return;
  }
  // Bans of others at the same address are left for their names.
  const isSameAddress = ({ address }: Ban) => address === ban.address;
  server.bans = server.bans
    .filter((other) => other !== ban)
    .map((other) => (isSameAddress(other) ? { ...other, address: "" } : other));
  announce(server, `${ban.name} is not banned any more (unbanned by ${operator.name}).`);
}

/** Why a client cannot have a name for now, or null. Operators come in from every address. */
function checkBan(server: Server, client: Client, event: NameEvent): string | null {
  if (server.bans.length === 0) return null;
  const { name, keys } = createPerson(event.name);
  const mayPass = event.type === "nick" || server.operators.has(foldName(name));
  const address = mayPass ? undefined : client.address?.key;

  const ban = server.bans.find((ban) => {
    return ban.address === address || ban.keys.some((key) => keys.includes(key));
  });
  if (!ban) return null;
  if (event.type === "nick")
    return `* The name ${name} is banned for another ${formatTimeLeft(ban)}.`;
  return `* You are banned for another ${formatTimeLeft(ban)}.`;
}

// --- The history -------------------------------------------------------------------------------
// The history is what the room has heard: no private messages, no answers, no refusals. Each batch is
// a row of a SQLite table, stored just before it is sent. Its position is its time in µs, which no
// other batch has. An empty row is a gap: what came just before it is not known. The first row is
// always one.

type StoredBatch = { at: number; text: string };
type History = ReturnType<typeof openHistory>;

// Whether somebody says something in a batch. People come and go far more often in some rooms.
const HAS_SAID = "instr(char(10) || text, char(10) || '[') > 0";

// Entry N upgrades a file from version N to N + 1.
const SCHEMA = [
  "CREATE TABLE history (at INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT",
  `CREATE TABLE accounts (name TEXT PRIMARY KEY, hash TEXT NOT NULL) STRICT, WITHOUT ROWID;
   CREATE TABLE looks (
     look TEXT, name TEXT REFERENCES accounts ON DELETE CASCADE, PRIMARY KEY (look, name)
   ) STRICT, WITHOUT ROWID;
   CREATE INDEX names ON looks (name)`,
  `CREATE INDEX said ON history (at) WHERE ${HAS_SAID}`,
];
const IN_MEMORY = ":memory:";
const APPLICATION_ID = 0x62_75_6e_63; // "bunc", in bytes 68 to 71 of the file (SQLite, file format)

const FILE_PROBLEMS: readonly { code: RegExp; reason: string }[] = [
  { code: /ENOENT/, reason: "there is no such folder" },
  { code: /EISDIR/, reason: "it is a folder" },
  { code: /EACCES|EPERM|EROFS|READONLY|CANTOPEN|IOERR_LOCK/, reason: "it cannot be written there" },
  { code: /BUSY/, reason: "another server uses it" },
  { code: /NOTADB|CORRUPT/, reason: "it is damaged" },
  { code: /FULL|ENOSPC/, reason: "the disk is full" },
  { code: /IOERR/, reason: "the disk fails, or a limit on the size of files is reached" },
];

function reasonOf(error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException;
  return FILE_PROBLEMS.find((problem) => problem.code.test(`${code}`))?.reason ?? message;
}

/**
 * Opens the history in a file, or in memory, where it is small.
 * @throws Error with a message for the user
 */
function openHistory({ db: file, logError }: ServerOptions) {
  const isComplete = wasComplete(file);
  const database = openDatabase(file);
  const statements = prepareStatements(database);

  let position = lastPosition(database);
  let failure: { at: number; retryAfter: number } | null = null; // null while batches can be stored
  let unmeasured = 0; // characters stored since the last look at the memory
  let forgetting: Timer | undefined; // there is more to forget
  let forgetNotBefore = -Infinity; // ms; after a failure
  let overwriteNotBefore = -Infinity; // ms
  let isOverwritten = true; // all that was forgotten is

  if (!isComplete) {
    position = Math.max(position + 1, Date.now() * 1000);
    failure = { at: position, retryAfter: -Infinity };
  }

  // Both or nothing: a gap alone may still fit on the disk, and each try would leave another one.
  const storeBehindGap = database.transaction((gap: number, text: string) => {
    statements.insert.run(gap, "");
    statements.insert.run(position, text);
  });

  function store(text: string): void {
    if (failure) {
      storeBehindGap.immediate(failure.at, text);
      logError?.("The history can be stored again. Something is missing in it.");
      stamp(file, Date.now());
      failure = null;
    } else {
      statements.insert.run(position, text);
    }
    unmeasured += text.length;
    if (file === undefined && unmeasured > CHECK_MEMORY) keepSmall();
  }

  function keepSmall(): void {
    unmeasured = 0;
    while ((statements.measure.get()?.bytes ?? 0) > HISTORY_MEMORY) {
      if (!forget(position)) break;
    }
  }

  function handleFailure(error: unknown): void {
    if (!failure) logError?.(`The history cannot be stored: ${reasonOf(error)}. The chat goes on.`);
    stamp(file, INCOMPLETE);
    failure = { at: position, retryAfter: performance.now() + STORE_AGAIN };
  }

  /** Forgets some batches that are older than a position. @returns whether there were any */
  function forget(before: number): boolean {
    const oldest = statements.selectOldest.get(before, FORGET_AT_ONCE, FORGET_BYTES);
    if (!oldest || oldest.first === oldest.last) return false;
    statements.empty.run(oldest.last); // first, so that a crash in between leaves no gap unknown
    statements.remove.run(oldest.last);
    isOverwritten = false;
    return true;
  }

  /** Forgets what is older than a position, in small steps. */
  function forgetBefore(oldest: number): void {
    const started = performance.now();
    clearTimeout(forgetting);
    // While something cannot be stored, nothing may touch the file: its time stamp says so.
    if (failure || started < forgetNotBefore) return;
    try {
      while (forget(oldest)) {
        if (performance.now() < started + FORGETTING) continue;
        forgetting = setTimeout(forgetBefore, FORGET_MORE, oldest);
        return;
      }
      overwrite();
    } catch (error) {
      logError?.(`The history cannot be made shorter: ${reasonOf(error)}.`);
      forgetNotBefore = started + FORGET_AGAIN;
    }
  }

  /** Until the -wal file is written into the other one, both still hold what was forgotten. */
  function overwrite(): void {
    if (isOverwritten || performance.now() < overwriteNotBefore) return;
    database.run("PRAGMA wal_checkpoint(TRUNCATE)");
    overwriteNotBefore = performance.now() + OVERWRITE;
    isOverwritten = true;
  }

  return {
    database,

    /** The position of the last batch. */
    get position() {
      return position;
    },

    /** Something else was stored in the file, which must still tell that a batch is missing. */
    keepStamp(): void {
      if (failure) stamp(file, INCOMPLETE);
    },

    forgetBefore,

    /** Stores a batch. What cannot be stored is a gap. @returns its position */
    save(text: string): number {
      position = Math.max(position + 1, Date.now() * 1000);
      if (failure && performance.now() < failure.retryAfter) {
        failure.at = position;
        return position;
      }
      try {
        store(text);
      } catch (error) {
        handleFailure(error);
      }
      return position;
    },

    /** The first batch after a position, which is empty if something is missing before its end. */
    next(after: number): StoredBatch | null {
      try {
        const batch = statements.select.get(after);
        if (batch) return batch;
        return failure && failure.at > after ? { at: failure.at, text: "" } : null;
      } catch (error) {
        logError?.(`The history cannot be read: ${reasonOf(error)}.`);
        return position > after ? { at: position, text: "" } : null;
      }
    },

    /**
     * What people said last before a position: so many lines, or some more, because a batch comes as a
     * whole. From very long batches it may be less.
     */
    saidBefore(before: number, count: number): Said[] {
      let said: Said[] = [];
      let searched = 0; // characters
      try {
        let batch = statements.selectSaid.get(before);
        while (batch && said.length < count && searched < MAX_SEARCH) {
          const { at, text } = batch;
          const lines = text.split("\n").filter((line) => line.startsWith("["));
          said = [...lines.map((line) => ({ at, line })), ...said];
          searched += text.length;
          batch = statements.selectSaid.get(at);
        }
      } catch (error) {
        logError?.(`The history cannot be read: ${reasonOf(error)}.`);
      }
      return said;
    },

    /** Leaves one file behind, which knows what is missing in it. */
    close(): void {
      clearTimeout(forgetting);
      try {
        if (failure) statements.insert.run(failure.at, "");
        failure = null;
      } catch {} // why it cannot be stored was said before
      try {
        database.close(true);
      } catch (error) {
        logError?.(`The history cannot be closed: ${reasonOf(error)}.`);
      }
      if (failure) stamp(file, INCOMPLETE);
    },
  };
}

function prepareStatements(database: Database) {
  return {
    insert: database.query<null, [at: number, text: string]>("INSERT INTO history VALUES (?, ?)"),

    select: database.query<StoredBatch, [after: number]>(
      "SELECT at, text FROM history WHERE at > ? ORDER BY at LIMIT 1",
    ),

    /** The last batch before a position in which somebody says something. */
    selectSaid: database.query<StoredBatch, [before: number]>(
      `SELECT at, text FROM history INDEXED BY said WHERE at < ? AND ${HAS_SAID}
       ORDER BY at DESC LIMIT 1`,
    ),

    /** The positions of the first and the last of the oldest batches. */
    selectOldest: database.query<
      { first: number; last: number },
      [before: number, batches: number, bytes: number]
    >(
      `SELECT min(at) AS first, max(at) AS last FROM (
         SELECT at, sum(octet_length(text)) OVER (ORDER BY at) - octet_length(text) AS bytesBefore
         FROM history WHERE at < ? ORDER BY at LIMIT ?)
       WHERE bytesBefore <= ?`,
    ),

    empty: database.query<null, [at: number]>("UPDATE history SET text = '' WHERE at = ?"),

    remove: database.query<null, [before: number]>("DELETE FROM history WHERE at < ?"),

    measure: database.query<{ bytes: number }, []>(
      `SELECT (page_count - freelist_count) * page_size AS bytes
       FROM pragma_page_count, pragma_freelist_count, pragma_page_size`,
    ),
  };
}

/** @throws Error with a message for the user */
function openDatabase(file?: string): Database {
  if (file === undefined) return prepareDatabase(IN_MEMORY);
  try {
    const path = resolve(file); // SQLite would take some names for something else
    checkFile(path);
    return prepareDatabase(path);
  } catch (error) {
    throw new Error(`${file} cannot be the history: ${reasonOf(error)}.`);
  }
}

// A full disk takes no row that says that something is missing, but it takes a time stamp.
const INCOMPLETE = 0; // ms since 1970

/** Sets the time stamp of a file, which says whether its end is complete. */
function stamp(file = "", time: number): void {
  try {
    utimesSync(file, new Date(time), new Date(time));
  } catch {} // it is in memory, or the file is gone
}

/** Whether a server before this one could store everything. */
function wasComplete(file?: string): boolean {
  const status = file === undefined ? undefined : statSync(file, { throwIfNoEntry: false });
  return status?.mtimeMs !== INCOMPLETE;
}

/** Makes sure of a file before SQLite touches it. Only its owner may read a new one. */
function checkFile(path: string): void {
  const fd = openSync(path, "a+", 0o600);
  try {
    if (!fstatSync(fd).isFile()) throw new Error("it is not a file");
    const header = Buffer.alloc(100);
    const size = readSync(fd, header, 0, header.length, 0);
    if (size > 0 && header.readUInt32BE(68) !== APPLICATION_ID)
      throw new Error("it belongs to another program");
  } finally {
    closeSync(fd);
  }
}

function prepareDatabase(path: string): Database {
  const database = new Database(path);
  try {
    // No other process may have the file, which makes storing twice as fast.
    database.run("PRAGMA locking_mode = EXCLUSIVE");
    const version = versionOf(database);
    if (version > SCHEMA.length) throw new Error("it was made by a newer version of bun-chat");
    if (version < SCHEMA.length) database.transaction(renew).immediate(database, version);

    // An end of the process loses nothing that was stored; a power failure may lose the last seconds.
    database.run("PRAGMA journal_mode = WAL");
    database.run("PRAGMA synchronous = NORMAL");
    database.run("PRAGMA foreign_keys = ON");
    if (path !== IN_MEMORY) database.run("PRAGMA secure_delete = ON"); // overwrites what is forgotten
    lastPosition(database); // throws if the table cannot be read
    return database;
  } catch (error) {
    database.close();
    throw error;
  }
}

function versionOf(database: Database): number {
  const query = database.query<{ version: number }, []>(
    "SELECT user_version AS version FROM pragma_user_version",
  );
  return query.get()?.version ?? 0;
}

function lastPosition(database: Database): number {
  return database.query<{ at: number }, []>("SELECT max(at) AS at FROM history").get()?.at ?? 0;
}

/** Makes a new file, or one of an older version, what this version expects. */
function renew(database: Database, version: number): void {
  for (const change of SCHEMA.slice(version)) database.run(change);
  if (version === 0) database.run("INSERT INTO history VALUES (?, '')", [Date.now() * 1000]);
  database.run(`PRAGMA application_id = ${APPLICATION_ID}`);
  database.run(`PRAGMA user_version = ${SCHEMA.length}`);
}

/** Stores a batch, which is about to leave. @returns its mark, a line */
function storeBatch(server: Server, text: string): string {
  const at = server.history.save(text);
  if (server.saidInBatch.length > 0) {
    server.said = lastSaid(server, at);
    server.saidInBatch = [];
    dropRecalls(server);
  }
  return markOf(at);
}

/** The last lines that people have said. Those in the batch are said at this position. */
function lastSaid({ said, saidInBatch }: Server, at: number): Said[] {
  const inBatch = saidInBatch.slice(-MAX_RECALL).map((line) => ({ at, line }));
  return [...said, ...inBatch].slice(-MAX_RECALL);
}

/** Remembers a line for /history. */
function rememberSaid(server: Server, line: string): void {
  server.saidInBatch.push(line);
  dropRecalls(server);
}

/** The answers to /history are out of date. */
function dropRecalls(server: Server): void {
  server.recallForPeople = null;
  server.recallForFollowers = null;
}

/** Once a second: forgets what is older than --keep. */
function forgetOld(server: Server): void {
  const { keep } = server.options;
  if (keep === 0) return;
  const oldest = (Date.now() - keep * DAY) * 1000;
  server.history.forgetBefore(oldest);

  const [first] = server.said;
  if (!first || first.at >= oldest) return;
  server.said = server.said.filter(({ at }) => at >= oldest);
  dropRecalls(server);
}

/** Answers /history: with the last lines, or with what was said before a position. */
function sendHistory(server: Server, client: Client, rest: string): void {
  const [, typedCount = "", typedPosition = ""] = /^(\d{1,9})?(?: +(\d{1,16}))?$/.exec(rest) ?? [];
  const count = Number(typedCount);
  if (rest !== "" && count === 0) {
    answer(server, client, `* Say it like this: /history N, with N from 1 to ${MAX_RECALL}`);
  } else if (typedPosition !== "") {
    sendOlder(server, client, Math.min(count, MAX_RECALL), Number(typedPosition));
  } else {
    sendRecall(server, client, count || DEFAULT_RECALL);
  }
}

/** Sends the last lines, a part of what all get. */
function sendRecall(server: Server, client: Client, count: number): void {
  if (server.said.length + server.saidInBatch.length === 0) {
    answer(server, client, "* Nothing has been said yet.");
    return;
  }

  const { parcel, starts } =
    client.following.is === "no" ? forPeople(server) : forFollowers(server);
  const start = starts.at(-count) ?? 0;
  const end = parcel.bytes.length;
  extendOwnBatch(client, server.batchBytes).push({ parcel, start, end });
  scheduleFlush(server, true);
  server.counts.linesOut += Math.min(count, starts.length);
  server.answerBytes += end - start;
  client.sliceUsed += end - start;
  charge(server, client, (end - start) / HISTORY_BYTES_PER_UNIT);
}

/** Sends what was said before a position, which is read for this answer alone. */
function sendOlder(server: Server, client: Client, count: number, before: number): void {
  const said = server.history.saidBefore(before, count);
  if (said.length === 0) {
    answer(server, client, "* Nothing was said before that.");
    return;
  }
  const showTime = client.following.is === "no" ? formatTime : String;
  answer(server, client, said.map((line) => showSaid(line, showTime)).join("\n"));
  chargeAnswer(server, client, said.length * BATCH_OVERHEAD);
}

/** A line of an answer to /history. People see dates, and followers positions. */
function showSaid({ at, line }: Said, showTime: (at: number) => string): string {
  return `* ${showTime(at)} ${line}`;
}

function forPeople(server: Server): Recall {
  server.recallForPeople ??= createRecall(server, formatTime);
  return server.recallForPeople;
}

function forFollowers(server: Server): Recall {
  server.recallForFollowers ??= createRecall(server, String);
  return server.recallForFollowers;
}

function createRecall(server: Server, showTime: (at: number) => string): Recall {
  const now = Math.max(server.history.position + 1, Date.now() * 1000); // about
  const said = lastSaid(server, now);
  const starts: number[] = [];
  let text = "";
  let bytes = 0;
  for (const entry of said) {
    const shown = `${showSaid(entry, showTime)}\n`;
    starts.push(bytes);
    text += shown;
    bytes += Buffer.byteLength(shown);
  }
  return { said, parcel: new Parcel(Buffer.from(text)), starts };
}

/** The minute of a position, in local time. */
function formatTime(at: number): string {
  return new Date(at / 1000).toLocaleString("sv").slice(0, "2026-12-31 23:59".length);
}

// --- Followers ---------------------------------------------------------------------------------
// A program that must not miss a line says /since. From then on it is a follower: it hears its own
// lines, too, after each batch a mark, "* POSITION", and after the answer to each of its commands
// "* Answered". When its connection is lost, it comes back and says "/since POSITION", with the last
// mark. The answer begins with
//
//     * Since FROM until JOINED
//
// and goes on with the batches after FROM and their marks. From FROM on, nothing is missing. If
// something is missing later on, such a line comes again there. JOINED is the last position before the
// client joined, so the next batch has its arrival. What it said on an earlier connection, under the
// same name, comes before that arrival, or did not arrive.
//
// "/since" alone asks for everything since the client joined, and "/since -N" first for the last N lines
// that were said before.

function markOf(at: number): string {
  return `* ${at}\n`;
}

/** Answers /since. What the client has missed comes after the next flush; until then nothing is read. */
function follow(server: Server, client: Client, rest: string): void {
  if (!/^(-?\d{1,16})?$/.test(rest)) {
    answer(server, client, "* Say it like this: /since POSITION");
    return;
  }

  const number = rest === "" ? client.joinedAfter : Number(rest);
  const from = rest.startsWith("-") ? { lastLines: -number } : { position: number };
  client.following = { is: "asked", from };

  // The replay brings the rest of this batch. What only it was told comes nowhere else.
  const isTold = (part: Part) => "text" in part || "parcel" in part;
  client.ownBatch = client.ownBatch?.filter(isTold) ?? null;
  client.ownBatchEnd = 0;
  server.newFollowers.push(client);
  scheduleFlush(server, true);
}

/** Whether a client gets the batches as they come. */
function hearsBatches({ following }: Client): boolean {
  return following.is === "no" || following.is === "live";
}

/** Ends the answer to a command, or to a line that is too long: a follower has to know what has arrived. */
function confirmAnswer(server: Server, client: Client): void {
  const isLive = client.phase === "joined" && client.following.is === "live";
  if (isLive) tell(server, client, "* Answered");
}

/** Called at the end of a flush, when the arrival of each new follower is in the history. */
function startReplays(server: Server): void {
  for (const client of server.newFollowers.splice(0))
    postpone(server, client, () => startReplay(server, client));
}

function startReplay(server: Server, client: Client): void {
  if (client.following.is !== "asked" || client.phase !== "joined") return;
  if (isTurnOver(server)) {
    postpone(server, client, () => startReplay(server, client));
    return;
  }

  const { from } = client.following;
  if ("lastLines" in from) sendLastLines(server, client, from.lastLines);

  const { history } = server;
  const asked = "lastLines" in from ? client.joinedAfter : from.position;
  const start = Math.min(asked, history.position); // it may be of another history
  const first = history.next(start);
  const until = first?.text === "" ? first.at : start;
  client.following = { is: "replaying", until };
  replaySome(server, client, sinceLine(client, until));
}

/** Sends the last lines that people have said before a client joined, a part of what all get. */
function sendLastLines(server: Server, client: Client, count: number): void {
  const { said, parcel, starts } = forFollowers(server);
  const after = said.findIndex(({ at }) => at > client.joinedAfter);
  const end = after === -1 ? said.length : after;

  const start = starts[Math.max(0, end - count)] ?? parcel.bytes.length;
  const piece = { parcel, start, end: starts[end] ?? parcel.bytes.length };
  send(server, client, piece);
  payForReplay(server, client, piece.end - piece.start);
}

function sinceLine({ joinedAfter }: Client, position: number): string {
  return `* Since ${position} until ${joinedAfter}\n`;
}

/** Sends some of what a client has missed. When that was all, it gets the batches as they come. */
function replaySome(server: Server, client: Client, begin = ""): void {
  if (client.phase !== "joined" || client.following.is !== "replaying") return;
  if (isTurnOver(server)) {
    postpone(server, client, () => replaySome(server, client, begin));
    return;
  }

  let text = begin;
  let { until } = client.following;
  let batches = 0;
  let batch = server.history.next(until);
  while (batch && batches < MAX_REPLAY_BATCHES && text.length < MAX_REPLAY) {
    until = batch.at;
    text += batch.text === "" ? sinceLine(client, until) : batch.text + markOf(until);
    batches++;
    batch = server.history.next(until);
  }

  const parcel = new Parcel(Buffer.from(text));
  send(server, client, wholeOf(parcel));
  payForReplay(server, client, parcel.bytes.length + batches * BATCH_OVERHEAD);
  dropGreediest(server);

  if (batch) {
    client.following = { is: "draining", until };
    replayMoreLater(server, client);
  } else {
    client.following = { is: "live" };
    readOn(server, client);
  }
}

/** Charges for bytes of the history. Many may come back from one address, so each pays on its own. */
function payForReplay(server: Server, client: Client, bytes: number): void {
  const { rate } = server.options;
  if (rate === 0) return;
  spend(client, bytes / HISTORY_BYTES_PER_UNIT, rate); // for which its next line waits
  spend(client.replay, bytes, REPLAY_RATE, REPLAY_BURST); // for which the replay waits
}

/** Goes on when a client has read what it got, and has paid for it. */
function replayMoreLater(server: Server, client: Client): void {
  if (client.following.is !== "draining" || client.queue.length > 0) return;

  client.following = { is: "replaying", until: client.following.until };
  const wait = Math.max(0, client.replay.paidUntil - performance.now());
  setTimeout(postpone, wait, server, client, () => replaySome(server, client));
}

// --- Budgets -----------------------------------------------------------------------------------
// Work is paid for with time: a unit, which is about a short line, costs 1/rate of a second. A
// client that is ahead of the rate waits, and loses nothing. A line is charged when it begins to wait, so that
// clients with a common budget take turns.

/**
 * Charges a client for work, and its address where connections per address are limited.
 * @returns ms until the work is paid for; 0 if there was credit for it
 */
function charge(server: Server, client: Client, units: number): number {
  const { rate } = server.options;
  if (rate === 0) return 0;

  const wait = spend(client, units, rate);
  if (!client.address || !sharesBudget(server)) return wait;
  return Math.max(wait, spend(client.address, units, ADDRESS_SHARE * rate));
}

/**
 * Charges an account that earns `rate` units a second and can save up `burst` ms' worth.
 * @returns ms until they are paid for
 */
function spend(account: Account, units: number, rate: number, burst = BURST): number {
  const now = performance.now();
  account.paidUntil = Math.max(account.paidUntil, now - burst) + (units * 1000) / rate;
  return Math.max(0, account.paidUntil - now);
}

/**
 * Charges for a line. The line that a client was held back for is paid.
 * @returns ms until it is paid for
 */
function payForLine(server: Server, client: Client, line: Buffer): number {
  if (server.options.rate === 0 || client.phase !== "joined") return 0; // coming has a price of its own
  if (client.linePaid) {
    client.linePaid = false;
    return 0;
  }

  // Each byte that is not UTF-8 becomes U+FFFD, which has three.
  const bytes = isUtf8(line) ? line.length : 3 * line.length;
  const length = Math.min(bytes, 3 * MAX_LINE);
  const ownWait = charge(server, client, 1 + Math.floor(length / BYTES_PER_UNIT));
  // Two names: a new one after /nick, for instance.
  const heard = length + 2 * Buffer.byteLength(nameOf(server.room, client.id)) + LINE_OVERHEAD;
  const share = ROOM_RATE / Math.max(1, server.clients.length);
  const isBeyondShare = spend(client.share, heard, share, ROOM_BURST) > 0;
  const roomWait = spend(server, heard, ROOM_RATE, ROOM_BURST);
  const wait = Math.max(ownWait, isBeyondShare ? roomWait : 0); // the others need not wait for it
  client.linePaid = wait > 0;
  return wait;
}

/** Charges for an answer of so many bytes. It is not held back, but the next line is. */
function chargeAnswer(server: Server, client: Client, bytes: number): void {
  client.sliceUsed += bytes;
  server.answerBytes += bytes;
  charge(server, client, bytes / ANSWER_BYTES_PER_UNIT);
}

/** Whether all connections of an address have a common budget. */
function sharesBudget(server: Server): boolean {
  return server.options.rate > 0 && server.options.maxPerAddress !== undefined;
}

/** Lets a connection arrive. @returns whether it may, or too many have come from its address */
function takeArrival(server: Server, { address }: Client): boolean {
  if (!address || !sharesBudget(server)) return true;
  if (address.arrivals === 0) return false;
  address.arrivals--;
  return true;
}

function waitForArrival(client: Client): void {
  client.address?.waiting.add(client);
  client.deadline = Infinity; // its minute begins when it is greeted
  client.heldBack = true;
  if (client.awaitsHandshake) client.socket.pause(); // a handshake would cost something
}

/** Once a second: gives back credit, greets one that waits, or forgets an idle address. */
function sweepAddress(server: Server, address: Address): void {
  address.guessCredit = Math.min(MAX_GUESS_CREDIT, address.guessCredit + 1);

  // Where nothing is read before the handshake, nothing tells of an end.
  for (const client of address.waiting) {
    if (!client.awaitsHandshake || !hasEnded(client.socket)) continue;
    address.waiting.delete(client);
    client.socket.terminate();
  }
  const [next] = address.waiting;
  if (next) {
    address.waiting.delete(next);
    next.deadline = performance.now() + LOBBY_DEADLINE;
    if (!next.awaitsHandshake) serve(server, next, () => greetOrRefuse(server, next));
    readOn(server, next); // under TLS this lets the handshake go on
  } else if (address.arrivals < MAX_ARRIVALS) {
    address.arrivals++;
  } else if (hasAllCredit(address)) {
    server.addresses.delete(address.key);
  }
}

/** Whether nothing has to be remembered of an address. */
function hasAllCredit(address: Address): boolean {
  const { connections, guessCredit, paidUntil, hashing, registrations } = address;
  const now = performance.now();
  const hasPaid = paidUntil < now - BURST && hashing.paidUntil < now - HASHING_BURST;
  const mayRegister = registrations.paidUntil < now - REGISTER_BURST;
  return connections === 0 && guessCredit === MAX_GUESS_CREDIT && hasPaid && mayRegister;
}

function findAddress(server: Server, host: string): Address {
  const key = addressKey(host);
  const known = server.addresses.get(key);
  if (known) return known;

  const address = new Address(key);
  server.addresses.set(key, address);
  return address;
}

/**
 * What counts as one address: an IPv4 address, also in its IPv6 form (RFC 4291, section 2.5.5.2), or
 * the first 64 bits of an IPv6 address, because a site has all of a /64 at least (RFC 6177).
 */
export function addressKey(address: string): string {
  const host = toIpv4(address);
  if (!host.includes(":")) return host;

  const [before = "", after = ""] = host.split("::");
  const groups = before === "" ? [] : before.split(":");
  const last = after === "" ? [] : after.split(":");
  while (groups.length + last.length < 8) groups.push("0");
  return [...groups, ...last].slice(0, 4).join(":");
}

/** An address in its only form (RFC 5952), without a zone. One of IPv4 in its IPv6 form is of IPv4. */
function canonicalAddress(host: string): string {
  if (isIP(host) !== 6) return host;
  const { hostname } = new URL(`http://[${host.replace(/%.*/, "")}]`);
  const [, high, low] = /^\[::ffff:([\da-f]+):([\da-f]+)\]$/.exec(hostname) ?? [];
  if (high === undefined || low === undefined) return hostname.slice(1, -1);

  const groups = Buffer.alloc(4);
  groups.writeUInt16BE(parseInt(high, 16), 0);
  groups.writeUInt16BE(parseInt(low, 16), 2);
  return groups.join(".");
}

/** An IPv4 address that came in its IPv6 form. */
function toIpv4(host: string): string {
  const [, ipv4 = host] = /^::ffff:(\d+\.\d+\.\d+\.\d+)$/i.exec(host) ?? [];
  return ipv4;
}

// --- Browsers ----------------------------------------------------------------------------------
// With --web, Bun.serve hands out the page, and a WebSocket at /room brings the same lines: a frame of
// text holds whole lines, but for very long ones. A `WebConnection` makes a socket of it, and nothing
// else of the server knows about browsers.

/** What belongs to a WebSocket. */
type Visitor = {
  peer: Peer;
  connection: WebConnection | null; // null until it is open
  received: string; // lines that have come in this turn of the event loop
  pings: number; // that have come since it was held back
};

/**
 * Opens the door for browsers.
 * @throws what Bun.serve throws, and what readFileSync throws where the page is missing
 */
function openWeb(server: Server, port: number) {
  const { host: hostname, tls = false } = server.options;
  const html = readFileSync(new URL("client.html", import.meta.url), "utf8");
  const headers = securityHeaders(html);

  const serveWeb = (port: number) =>
    Bun.serve<Visitor>({
      hostname,
      port,
      ...(tls && { tls }),
      development: false,
      idleTimeout: HTTP_DEADLINE,
      maxRequestBodySize: 0,
      fetch: (request, listener) => answerRequest(server, request, listener, { html, headers }),
      error(error) {
        server.options.logError?.(describe(error));
        return refuseRequest(500, "Something went wrong.");
      },
      websocket: createWebSocketHandler(server),
    });

  let listener: Bun.Server<Visitor>;
  try {
    listener = serveWeb(port);
  } catch (error) {
    throw Object.assign(error as Error, { option: "--web" });
  }
  const openPort = listener.port ?? 0; // it has none once it has stopped
  const limit = openFilesLimit();
  const watch = setInterval(endIdleVisitors, CHECK_DESCRIPTORS, server, openPort, limit);

  return {
    port: openPort,

    /** Those who are in the room stay there, on the old listener. */
    renewCertificate(): void {
      void listener.stop(false);
      listener = serveWeb(openPort);
    },

    stop(): void {
      clearInterval(watch);
      void listener.stop(false);
    },
  };
}

function createWebSocketHandler(server: Server): Bun.WebSocketHandler<Visitor> {
  return {
    maxPayloadLength: MAX_FRAME,
    backpressureLimit: 0, // Bun would leave out lines without a word; our own limit is MAX_QUEUE
    idleTimeout: NO_PONG,
    open: (socket) => serve(server, { socket }, () => handleWebOpen(server, socket)),
    message: (socket, lines) => handleFrame(server, socket.data, lines),
    ping: (socket) => serve(server, { socket }, () => handlePing(server, socket)),
    pong: (socket) => serve(server, { socket }, () => handlePing(server, socket)),
    drain({ data: { connection } }) {
      if (connection) handleDrain(server, connection.data);
    },
    close: (socket, code) =>
      serve(server, { socket }, () => handleWebClose(server, socket.data, code)),
  };
}

/** The page may run its own script and use its own style, and talk to this server; nothing else. */
function securityHeaders(html: string) {
  function sourceOf(tag: "script" | "style"): string {
    const [, code = ""] = new RegExp(`<${tag}\\b[^>]*>(.*?)</${tag}>`, "s").exec(html) ?? [];
    return `${tag}-src 'sha256-${new Bun.CryptoHasher("sha256").update(code).digest("base64")}'`;
  }

  const policy = [
    "default-src 'none'",
    sourceOf("script"),
    sourceOf("style"),
    "img-src data:",
    "connect-src 'self'",
    "frame-ancestors 'none'",
    "base-uri 'none'",
    "form-action 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
  ];
  return {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": policy.join("; "),
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
    ...ANSWER_HEADERS,
    "referrer-policy": "no-referrer",
  };
}

// One request a connection: Bun would answer as many as come, and let nobody else have a turn meanwhile.
const ANSWER_HEADERS = { connection: "close", "x-content-type-options": "nosniff" };

type Page = { html: string; headers: Record<string, string> };

/** Answers an HTTP request, or makes a WebSocket of it, which has no answer. */
function answerRequest(
  server: Server,
  request: Request,
  listener: Bun.Server<Visitor>,
  page: Page,
): Response | undefined {
  if (!isOurHost(server, request)) return refuseRequest(403, WRONG_HOST);
  if (request.method !== "GET" && request.method !== "HEAD")
    return refuseRequest(405, "This can only be read.");

  switch (URL.parse(request.url)?.pathname) {
    case "/":
      return new Response(page.html, { headers: page.headers });
    case "/room":
      if (!isOurOrigin(server, request)) return refuseRequest(403, WRONG_ORIGIN);
      if (upgrade(server, request, listener)) return undefined;
      return refuseRequest(426, "This is for WebSockets.");
    case "/metrics":
      return answerMetrics(server, request, peerOf(server, request, listener));
    default:
      return refuseRequest(404, "There is nothing here.");
  }
}

const WRONG_ORIGIN = "Pages of other sites cannot enter this room.";
const WRONG_HOST =
  "Open this room by its address, as in http://192.168.1.20:8080/, or start the server with --web-origin and what stands in your browser's address bar, as in http://chat.example.org:8080.";

function refuseRequest(status: number, why: string): Response {
  return new Response(`${why}\n`, { status, headers: ANSWER_HEADERS });
}

/**
 * Whether a request has come by a name that is ours. Somebody else's name may lead here as well (DNS
 * rebinding), so it must be an address, unless our certificate proves the name.
 */
function isOurHost({ options }: Server, request: Request): boolean {
  const host = request.headers.get("host") ?? "";
  const isAddress = /^(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?$/i.test(host);
  return isAddress || Boolean(options.tls) || host === hostOf(options.webOrigin);
}

function hostOf(origin?: string): string | undefined {
  return origin === undefined ? undefined : new URL(origin).host;
}

/** Whether a request comes from our own page, or from a program, which names no origin. */
function isOurOrigin({ options }: Server, { headers }: Request): boolean {
  const origin = headers.get("origin");
  const host = headers.get("host") ?? "";
  if (origin === null || origin === options.webOrigin) return true;

  const isNamed = host === hostOf(options.webOrigin); // which then counts with its own scheme only
  return !isNamed && origin === `${options.tls ? "https" : "http"}://${host}`;
}

function upgrade(server: Server, request: Request, listener: Bun.Server<Visitor>): boolean {
  const peer = peerOf(server, request, listener);
  return listener.upgrade(request, { data: { peer, connection: null, received: "", pings: 0 } });
}

/**
 * Where a request comes from. A proxy on this machine is believed when it names the address, the last
 * one in the list (X-Forwarded-For), if --web-origin says that there is a proxy.
 */
function peerOf({ options }: Server, request: Request, listener: Bun.Server<Visitor>): Peer {
  const { address = "", port = 0 } = listener.requestIP(request) ?? {};
  const isFromHere = isOfThisMachine(address);
  const { webOrigin = "", tls } = options;
  const forwarded = request.headers.get("x-forwarded-for");
  const isForwarded = forwarded !== null || request.headers.get("origin") === webOrigin;

  const named = forwarded?.split(",").at(-1)?.trim() ?? "";
  const isBelieved = isFromHere && webOrigin !== "" && isIP(named) !== 0;
  const isLocal = isFromHere && !isForwarded;
  const isProxySafe = isFromHere && isForwarded && webOrigin.startsWith("https:");
  return {
    host: isBelieved ? canonicalAddress(named) : address,
    port,
    isLocal,
    isSafe: isLocal || Boolean(tls) || isProxySafe,
  };
}

function handleWebOpen(server: Server, socket: Bun.ServerWebSocket<Visitor>): void {
  const connection = new WebConnection(server, socket);
  socket.data.connection = connection;
  handleClient(server, connection, socket.data.peer);
}

/** Collects the lines of a turn: a browser may send thousands of tiny frames. */
function handleFrame(server: Server, visitor: Visitor, lines: string | Buffer): void {
  server.inputs++;
  if (visitor.received === "") setImmediate(takeFrames, server, visitor);
  visitor.received += lines.toString(); // a binary frame is taken for text
  // The end of a frame ends a line. An empty frame is an empty line, which has a price.
  if (lines.length === 0 || !visitor.received.endsWith("\n")) visitor.received += "\n";
}

function takeFrames(server: Server, visitor: Visitor): void {
  const client = visitor.connection?.data;
  const { received } = visitor;
  visitor.received = "";
  if (received === "" || !client || !server.connections.has(client.id)) return;
  serve(server, client, () => handleData(server, client, Buffer.from(received)));
}

/** Bun answers pings by itself. They and pongs have a price, and a peer that reads no answers has to go. */
function handlePing(server: Server, socket: Bun.ServerWebSocket<Visitor>): void {
  if (socket.getBufferedAmount() > MAX_PONGS) {
    socket.terminate();
    return;
  }
  const visitor = socket.data;
  const client = visitor.connection?.data;
  if (!client) return;

  if (client.heldBack) {
    socket.pause(); // until it goes on
    visitor.pings++;
    if (visitor.pings > MAX_PINGS) socket.terminate();
    return;
  }
  visitor.pings = 0;
  const wait = charge(server, client, 1 / PINGS_PER_UNIT);
  if (wait === 0) return;
  pause(client);
  readOnAfter(wait, server, client);
}

/** The browser has closed in good order, or it is gone. */
function handleWebClose(server: Server, visitor: Visitor, code: number): void {
  const { connection } = visitor;
  if (!connection) return;
  const isInGoodOrder = code !== ABNORMAL_CLOSURE;
  if (isInGoodOrder) takeFrames(server, visitor);

  const client = connection.data;
  const hasLines = client.unread.length > 0 && client.phase !== "closing";
  if (isInGoodOrder && hasLines) connection.linger();
  else handleClose(server, client);
}

const ABNORMAL_CLOSURE = 1006; // no Close frame has come (RFC 6455, section 7.1.5)

/** A WebSocket that does what the room asks of a socket. */
class WebConnection implements Connection {
  declare data: Client; // set by `handleClient`
  private isLingering = false; // closed, but what came before is still being read

  constructor(
    private readonly server: Server,
    private readonly socket: Bun.ServerWebSocket<Visitor>,
  ) {}

  /** The other end of the TCP connection, be it a proxy. */
  get endpoint(): string {
    const { remoteAddress, data } = this.socket;
    return formatEndpoint(canonicalAddress(remoteAddress), data.peer.port);
  }

  /** @returns how many bytes were taken, which splits no character; -1 when it is closed */
  write(bytes: Buffer, start: number, length: number): number {
    if (this.isLingering) return length; // nobody is there to read it
    const end = start + length;
    let taken = start;
    // Bun keeps what the kernel does not take. Nothing follows before that has left.
    while (taken < end && this.socket.getBufferedAmount() === 0) {
      const frame = cutFrame(bytes, taken, end);
      if (this.socket.sendText(frame.text) === 0) return -1;
      taken = frame.end;
    }
    return taken - start;
  }

  /** Takes leave when all has been sent. Until then, each `drain` brings it back here. */
  shutdown(): void {
    if (this.isLingering) handleClose(this.server, this.data);
    else if (this.socket.getBufferedAmount() === 0) this.socket.close();
  }

  end(): void {
    this.socket.close();
  }

  terminate(): void {
    if (this.isLingering) handleClose(this.server, this.data);
    else this.socket.terminate();
  }

  pause(): void {
    this.socket.pause();
  }

  resume(): void {
    this.socket.resume();
  }

  /** Lets the lines that came before the end be read, as behind the FIN of a TCP connection. */
  linger(): void {
    this.isLingering = true;
    handleEnd(this.server, this.data);
    handleDrain(this.server, this.data);
  }
}

/** A frame: its text, and where in the bytes it ends. `limit` is where it had to. */
type Cut = { text: string; end: number; limit: number };

// The frames that were cut from the bytes sent last, by their start. A flush sends all the same ones.
let lastCuts: { bytes: Buffer; cuts: Map<number, Cut> } = { bytes: NOTHING, cuts: new Map() };

/** Cuts a frame from some bytes: whole lines, or a part of one that is too long. */
function cutFrame(bytes: Buffer, start: number, end: number): Cut {
  const limit = Math.min(start + MAX_FRAME, end);
  if (bytes !== lastCuts.bytes) lastCuts = { bytes, cuts: new Map() };
  const known = lastCuts.cuts.get(start);
  if (known?.limit === limit) return known;

  const place = limit === end ? end : findCut(bytes, start, limit);
  const cut = { text: bytes.toString("utf8", start, place), end: place, limit };
  const isSteady = bytes !== scratch; // which has something else in it the next time
  if (isSteady && lastCuts.cuts.size < MAX_CUTS) lastCuts.cuts.set(start, cut);
  return cut;
}

/** Where to cut: behind the last newline, or else between two characters. */
function findCut(bytes: Buffer, start: number, limit: number): number {
  const newline = bytes.lastIndexOf(NEWLINE, limit - 1);
  if (newline >= start) return newline + 1;

  let cut = limit;
  while (((bytes[cut] ?? 0) & 0b1100_0000) === 0b1000_0000) cut--; // not within UTF-8 (RFC 3629)
  return cut;
}

/**
 * Bun.serve takes any number of connections that ask for nothing, until there are no descriptors left.
 * Then those that are not in the room are ended, so that others get in.
 */
function endIdleVisitors(server: Server, port: number, limit: number): void {
  if (limit === Infinity || lowestFreeDescriptor() < limit - LAST_SOCKETS) return;

  const kept = new Set<string>();
  for (const { socket } of server.connections.values()) {
    if (socket instanceof WebConnection) kept.add(socket.endpoint);
  }
  endConnections(port, kept, limit);
}

/** The next descriptor that this process would get; all below it are in use. Infinity: none is left. */
function lowestFreeDescriptor(): number {
  try {
    const fd = openSync("/dev/null", "r");
    closeSync(fd);
    return fd;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    return code === "EMFILE" || code === "ENFILE" ? Infinity : 0; // 0: it cannot be told
  }
}

// --- Metrics -----------------------------------------------------------------------------------
// GET /metrics on the port for browsers answers in the text format of Prometheus, version 0.0.4:
// https://prometheus.io/docs/instrumenting/exposition_formats/

/** What is counted from the start on. */
class Counts {
  linesIn = 0;
  linesOut = 0;
  bytesIn = 0;
  bytesOut = 0;
  slow = 0; // readers that were disconnected
  refusals = new Map<string, number>(REFUSALS.map(({ reason }) => [reason, 0]));
  databaseErrors = 0;
  flushTimes = new Histogram([0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]); // s
  flushedLines = new Histogram([1, 3, 10, 30, 100, 300, 1000, 3000]);
}

/** How often a number was at most as large as each of some bounds. */
class Histogram {
  sum = 0;
  readonly counts: number[]; // of each bound and, at the end, above the last one

  constructor(readonly bounds: readonly number[]) {
    this.counts = [...bounds, Infinity].map(() => 0);
  }

  add(number: number): void {
    this.sum += number;
    const found = this.bounds.findIndex((bound) => number <= bound);
    const place = found === -1 ? this.bounds.length : found;
    this.counts[place] = (this.counts[place] ?? 0) + 1;
  }

  samples(): Sample[] {
    let total = 0;
    const buckets = this.counts.map((count, place): Sample => {
      total += count;
      return { suffix: `_bucket{le="${this.bounds[place] ?? "+Inf"}"}`, value: total };
    });
    return [...buckets, { suffix: "_sum", value: this.sum }, { suffix: "_count", value: total }];
  }
}

type Metric = { name: string; type: string; help: string; samples: Sample[] };

/** A value, and what follows the name of its metric. */
type Sample = { suffix: string; value: number };

// Why connections are refused, by what the log says: the first that fits. Another text needs a row.
const REFUSALS = [
  { reason: "full", sign: /^\* The server is full/ },
  { reason: "address", sign: /^\* Too many connections/ },
  { reason: "banned", sign: /^\* You are banned/ },
  { reason: "tls", sign: /^(it did not finish the TLS|the TLS handshake|it speaks TLS)/ },
  { reason: "deadline", sign: /^\* You.* within a minute\.$/ },
  {
    reason: "registered",
    sign: /^\* The name \S+ (is|looks).*regist|^it gave a password|^\* Pass/,
  },
  { reason: "taken", sign: /^\* The name \S+ (is taken|looks)/ },
  { reason: "name", sign: /^\* A name / },
  { reason: "other", sign: /^/ },
];

/** Counts the lines of a batch that is about to leave, once for each of its readers. */
function countLines({ counts, batchLines, linesLeftOut, clients, leavers }: Server): void {
  const readers = clients.length + leavers.length;
  counts.linesOut += Math.max(0, batchLines * readers - linesLeftOut); // some may have been cut off
  counts.flushedLines.add(batchLines);
}

function countRefusal({ counts }: Server, why: string): void {
  const reason = REFUSALS.find(({ sign }) => sign.test(why))?.reason ?? "other";
  counts.refusals.set(reason, (counts.refusals.get(reason) ?? 0) + 1);
}

/** Only programs of this machine, or those with the token, may read the metrics. */
function answerMetrics(server: Server, request: Request, peer: Peer): Response {
  const { metricsToken } = server.options;
  if (metricsToken === undefined && !peer.isLocal)
    return refuseRequest(403, "The metrics are for programs on this machine, or with a token.");
  if (metricsToken !== undefined && !hasToken(request, metricsToken))
    return refuseRequest(401, "Send the token: Authorization: Bearer TOKEN");
  return new Response(describeMetrics(server), {
    headers: { ...ANSWER_HEADERS, "content-type": "text/plain; version=0.0.4; charset=utf-8" },
  });
}

/** Compares hashes, whose time tells nothing of the token. */
function hasToken(request: Request, token: string): boolean {
  const digest = (text: string) => new Bun.CryptoHasher("sha256").update(text).digest();
  const sent = request.headers.get("authorization") ?? "";
  return timingSafeEqual(digest(sent), digest(`Bearer ${token}`));
}

function describeMetrics(server: Server): string {
  const { counts, clients, connections, memoryUsed } = server;
  const heldBack = Array.from(connections.values()).filter((client) => client.heldBack).length;
  const refusals = Array.from(counts.refusals, ([reason, value]): Sample => {
    return { suffix: `{reason="${reason}"}`, value };
  });

  const metrics = [
    createGauge("people", "People in the room.", clients.length),
    createGauge("connections", "Connections, in the room or not.", connections.size),
    createGauge("held_back_senders", "Connections whose lines wait to be read.", heldBack),
    createGauge("queued_bytes", "Memory for what waits, in both directions.", memoryUsed),
    createCounter("lines_in_total", "Lines that people have sent.", counts.linesIn),
    createCounter(
      "lines_out_total",
      "Lines for people, once for each reader; no replays.",
      counts.linesOut,
    ),
    createCounter("bytes_in_total", "Bytes that people have sent.", counts.bytesIn),
    createCounter("bytes_out_total", "Bytes handed to the kernel.", counts.bytesOut),
    createCounter("refusals_total", "Connections that were refused.", refusals),
    createCounter("slow_readers_total", "Clients disconnected as too slow.", counts.slow),
    createCounter("database_errors_total", "Failures of the database.", counts.databaseErrors),
    createHistogram("flush_seconds", "Time that a flush takes.", counts.flushTimes),
    createHistogram("flush_lines", "Lines that leave together.", counts.flushedLines),
  ];
  return metrics.map(describeMetric).join("");
}

function createGauge(name: string, help: string, value: number): Metric {
  return { name, type: "gauge", help, samples: [{ suffix: "", value }] };
}

function createCounter(name: string, help: string, count: number | Sample[]): Metric {
  const samples = typeof count === "number" ? [{ suffix: "", value: count }] : count;
  return { name, type: "counter", help, samples };
}

function createHistogram(name: string, help: string, histogram: Histogram): Metric {
  return { name, type: "histogram", help, samples: histogram.samples() };
}

function describeMetric({ name, type, help, samples }: Metric): string {
  const lines = samples.map(({ suffix, value }) => `bunchat_${name}${suffix} ${value}\n`);
  return `# HELP bunchat_${name} ${help}\n# TYPE bunchat_${name} ${type}\n${lines.join("")}`;
}

// --- Shutdown ----------------------------------------------------------------------------------

const SHUTDOWN = "* The server is shutting down";

/** Delivers what was said, announces the end, and gives everybody some time to read it all. */
async function stop(server: Server, listener: Bun.TCPSocketListener<Client>, sweeper: Timer) {
  const started = performance.now();
  listener.stop(false);
  clearInterval(sweeper);

  // What clients have sent before is in the kernel: it is all read when a look brings nothing new.
  let inputs = -1;
  while (inputs < server.inputs || server.sliced.size + server.postponed.length > 0) {
    if (performance.now() > started + STOP_DEADLINE / 5) break;
    inputs = server.inputs;
    await Bun.sleep(5);
    await lookAtSockets(); // on a busy machine the time may be over before it has done so
  }

  for (const client of server.clients) tellTooLate(server, client);
  broadcastMessage(server, SHUTDOWN);
  flush(server);

  for (const client of server.connections.values())
    serve(server, client, () => sayGoodbye(server, client));
  server.clients.length = 0;

  while (server.connections.size > 0 && performance.now() < started + STOP_DEADLINE)
    await Bun.sleep(5);
  for (const client of server.connections.values()) client.socket.terminate();
  server.history.close();
}

/** Lets the event loop look at all sockets at least once. */
async function lookAtSockets(): Promise<void> {
  for (let turn = 0; turn < 2; turn++) await new Promise((resolve) => setImmediate(resolve));
}

/** Tells those outside of the room, too, and sends the FIN. Nobody leaves: the room does. */
function sayGoodbye(server: Server, client: Client): void {
  const isWaiting = client.phase === "naming" || client.phase === "proving";
  const canRead = isWaiting || (client.phase === "connecting" && !client.awaitsHandshake);
  if (canRead) tell(server, client, SHUTDOWN);
  client.phase = "closing";
  if (client.heldBack) resume(client);
  finishWriting(client);
}

// --- The program -------------------------------------------------------------------------------

const VERSION = "0.1.0";
const MAX_LOG = 1 * MIB; // characters that may wait for somebody to read them

const OPTIONS = [
  ["host", "HOST", `the address to listen on (${DEFAULTS.host}; 0.0.0.0 for the whole network)`],
  ["port", "PORT", `the port to listen on (${DEFAULTS.port}; 0 takes a free one)`],
  ["rate", "N", `short lines a second from one client (${DEFAULTS.rate}; 0 for no limit)`],
  ["max-clients", "N", `connections at a time (${DEFAULTS.maxClients})`],
  ["max-per-address", "N", "connections from one address (64; no limit for this machine alone)"],
  ["tls-cert", "FILE", "encrypt the room with this certificate (PEM), read again on SIGHUP"],
  ["tls-key", "FILE", "and with this private key (PEM)"],
  ["db", "FILE", "keep the history and registered names in this file (SQLite)"],
  ["keep", "DAYS", `until what was said is forgotten (${DEFAULTS.keep}; 0 for never)`],
  ["operators", "NAMES", "registered people who may show others out: alice,bob (needs --db)"],
  ["web", "PORT", "let browsers in, by the page client.html on this port (0 takes a free one)"],
  [
    "web-origin",
    "URL",
    "the URL that browsers see, behind a proxy or under a name: https://chat.example.org",
  ],
  [
    "metrics-token",
    "TOKEN",
    "let those with this token read /metrics, from anywhere, and nobody else",
  ],
  ["quiet", "", "print only start, stop and errors"],
  ["help", "", "show this text"],
  ["version", "", "show the version"],
] as const;

const USAGE = `Usage: bun server.ts [options]

Opens a chat room. People enter it with "bun client.ts", with "nc HOST PORT", or, with --web, in a browser.

${OPTIONS.map(([name, value, help]) => `  --${name} ${value}`.padEnd(25) + help).join("\n")}`;

/** What a browser on this machine can open. */
function urlOf({ host, tls }: { host: string; tls: unknown }, port: number): string {
  const isAnyHost = /^(0\.0\.0\.0|::)$/.test(host);
  return `http${tls ? "s" : ""}://${formatEndpoint(isAnyHost ? "localhost" : host, port)}/`;
}

/** The program: a room, its signals and its terminal. @throws what readOptions and startServer throw */
export function main(): void {
  const { quiet, ...options } = readOptions();
  const print = createPrinter(process.stdout);
  const logError = createPrinter(process.stderr);
  const server = startServer({ ...options, log: quiet ? undefined : print, logError });
  const endpoint = formatEndpoint(options.host, server.port);
  print(`Server is running on ${endpoint}, waiting for connections...`);
  if (server.webPort !== undefined)
    print(`Browsers: ${options.webOrigin ?? urlOf(options, server.webPort)}`);
  if (server.maxClients < options.maxClients)
    print(`At most ${server.maxClients} clients: more would need more open files (ulimit -n).`);

  let isEnding = false;

  function shutDown(exitCode: number): void {
    process.exitCode = exitCode;
    if (isEnding) return; // an error on the way out
    isEnding = true;

    // The second signal ends the process at once, as it does where nobody listens to it.
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.removeAllListeners(signal);
    if (options.tls) process.on("SIGHUP", () => {}); // too late to renew the certificate
    print("Server is shutting down");
    // Output that nobody reads may hold up the end, but not for ever.
    const exit = () => setTimeout(process.exit, 400).unref();
    server.stop().then(exit, failAgain);
  }

  // Nobody knows what state this leaves the room in. It ends in good order, with exit code 1, so that
  // a supervisor starts a new one.
  function fail(error: unknown): void {
    process.removeAllListeners("uncaughtException").on("uncaughtException", failAgain);
    logError(describe(error));
    shutDown(1);
  }

  function failAgain(error: unknown): void {
    console.error(describe(error));
    process.exit(1);
  }

  function renewCertificate(): void {
    try {
      server.renewCertificate();
      print("The certificate has been read again.");
    } catch (error) {
      logError(`The certificate stays as it was. ${explain(error)}`);
    }
  }

  if (process.stdin.isTTY) {
    attendTerminal(print, server.command);
  }
  process.on("SIGINT", () => shutDown(0));
  process.on("SIGTERM", () => shutDown(0));
  process.on("SIGHUP", () => (options.tls ? renewCertificate() : shutDown(0)));
  process.on("uncaughtException", fail);
}

/**
 * Prints the answer to each line that is typed at the terminal, while that belongs to the server. Reading
 * in the background (`bun server.ts &`) would stop the process.
 */
function attendTerminal(print: (text: string) => void, answer: (line: string) => string): void {
  const { stdin } = process;
  let typed = "";

  stdin.setEncoding("utf8");
  stdin.on("data", (chunk) => {
    const lines = (typed + chunk).split("\n");
    typed = lines.pop() ?? "";
    for (const line of lines) {
      const answers = answer(line);
      if (answers) print(answers);
    }
  });
  stdin.on("end", () => print("No more commands are read from this terminal."));
  stdin.on("error", () => {}); // the terminal is gone, and the chat goes on

  function attend(): void {
    if (isInForeground()) stdin.resume();
    else stdin.pause();
  }

  attend();
  process.on("SIGCONT", attend);
  process.on("SIGTSTP", () => {
    stdin.pause(); // before `bg` can make it read in the background
    process.kill(process.pid, "SIGSTOP");
  });
  setInterval(attend, 1000).unref(); // after `fg` there may be no signal
}

/** Whether this process may read from its terminal (proc_pid_stat(5)); on other systems than Linux, yes. */
function isInForeground(): boolean {
  try {
    const status = readFileSync("/proc/self/stat", "latin1");
    const [, , group, , , foregroundGroup] = status.slice(status.lastIndexOf(")") + 2).split(" ");
    return foregroundGroup === group || foregroundGroup === "-1"; // -1: no shell looks after it
  } catch {
    return true;
  }
}

function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

/**
 * The options that were typed. Shows the help or the version, and ends, when they ask for it.
 * @throws TypeError on bad options; its message is for the user
 */
function readOptions() {
  const { values } = parseArgs({
    options: Object.fromEntries(
      OPTIONS.map(([name, value]) => [name, { type: value ? "string" : "boolean" }] as const),
    ),
  });
  const { host, quiet, help, version, db, operators, "tls-cert": cert, "tls-key": key } = values;
  const { web, "web-origin": origin, "metrics-token": token } = values;
  if (help || version) {
    console.log(help ? USAGE : `bun-chat ${VERSION}`);
    process.exit(0);
  }
  if (host === "") throw new TypeError("--host takes an address");
  if (db === "") throw new TypeError("--db takes the name of a file");
  if ((cert === undefined) !== (key === undefined))
    throw new TypeError("--tls-cert and --tls-key go together");
  if (web === undefined && (origin ?? token) !== undefined)
    throw new TypeError("--web-origin and --metrics-token go together with --web");
  if (token === "") throw new TypeError("--metrics-token takes a token");
  if (operators !== undefined && db === undefined)
    throw new TypeError("--operators goes together with --db, where names are registered");

  function readInteger<T>(name: string, least: number, most: number, fallback: T) {
    const text = values[name];
    if (text === undefined) return fallback;
    const number = /^\d+$/.test(`${text}`) ? Number(text) : NaN;
    if (number >= least && number <= most) return number;
    throw new TypeError(
      `--${name} takes a number from ${least} to ${most}, not ${JSON.stringify(text)}`,
    );
  }

  return {
    host: `${host ?? DEFAULTS.host}`,
    port: readInteger("port", 0, 65_535, DEFAULTS.port),
    rate: readInteger("rate", 0, 1_000_000, DEFAULTS.rate),
    maxClients: readInteger("max-clients", 1, 1_000_000, DEFAULTS.maxClients),
    maxPerAddress: readInteger("max-per-address", 1, 1_000_000, undefined),
    db: db === undefined ? undefined : `${db}`,
    keep: readInteger("keep", 0, 36_500, DEFAULTS.keep),
    operators: operators === undefined ? [] : readNames(`${operators}`),
    tls: cert !== undefined && { cert: Bun.file(`${cert}`), key: Bun.file(`${key}`) },
    web: readInteger("web", 0, 65_535, undefined),
    webOrigin: origin === undefined ? undefined : readOrigin(`${origin}`),
    metricsToken: token === undefined ? undefined : `${token}`,
    quiet,
  };
}

/** @throws TypeError when it is no origin */
function readOrigin(text: string): string {
  const url = URL.parse(text);
  if (url && /^https?:$/.test(url.protocol) && url.href === `${url.origin}/`) return url.origin;
  throw new TypeError(
    `--web-origin takes a URL without a path, such as https://chat.example.org, not ${JSON.stringify(text)}`,
  );
}

/** @throws TypeError when one of them is no name */
function readNames(text: string): string[] {
  const names = text.split(",").map((name) => normalizeName(name.trim()));
  const isFree = (name: string) => checkPerson(new Room(), 0, createPerson(name)) === null;
  if (names.every(isFree)) return names;
  throw new TypeError(
    `--operators takes names with commas between them, not ${JSON.stringify(text)}`,
  );
}

// The code of an error, or the message of one that has no code.
const PROBLEMS: readonly { sign: RegExp; advice: string }[] = [
  { sign: /^EADDRINUSE$/, advice: "The port is in use: choose another one with --port." },
  {
    sign: /^EACCES$/,
    advice: "That port is for the administrator: choose one above 1023 with --port.",
  },
  {
    sign: /^E(ADDRNOTAVAIL|NOTFOUND)$|^Failed to listen/,
    advice: "This machine has no such address: change --host.",
  },
  { sign: /^ERR_OSSL_.*MISMATCH$/, advice: "The key does not belong to the certificate." },
  {
    sign: /OSSL|ISDIR|NOENT/,
    advice: "The certificate or the key is not in PEM, or the key needs a password.",
  },
];

/** An error at the start, and the option whose port it is about. */
type StartError = NodeJS.ErrnoException & { option?: string };

/** What to tell a person. A TypeError means bad options, or an empty certificate or key file. */
function explain(error: unknown): string {
  const { code, path, message, option = "--port" } = error as StartError;
  if (error instanceof TypeError) {
    const [what = ""] = message.split(/ is ambiguous|\.\s/);
    const why = message.includes(" is ambiguous") ? " is missing, or begins with -" : "";
    return `${what}${why}. See bun server.ts --help.`;
  }
  if (path !== undefined) return `The file ${path} cannot be read.`;
  const advice = PROBLEMS.find(({ sign }) => sign.test(code ?? message))?.advice ?? message;
  return advice.replace("--port", option);
}

/**
 * Returns a function that prints a line with the local time, all lines of a turn at once. Lines that
 * nobody reads in time are left out and counted.
 */
function createPrinter(stream: NodeJS.WriteStream): (line: string) => void {
  let turn = ""; // what is printed at the end of this turn
  let waiting = 0; // characters of earlier turns that nobody has read; Bun's `writableLength` is 0
  let lost = 0; // lines

  function print(): void {
    const { length } = turn;
    waiting += length;
    stream.write(turn, () => (waiting -= length));
    turn = "";
  }

  stream.on("error", () => {}); // the chat goes on without a log
  return (line) => {
    if (waiting > MAX_LOG) {
      lost++;
      return;
    }
    if (turn === "") setImmediate(print);
    const time = new Date().toLocaleString("sv"); // Swedish writes 2026-12-31 23:59:59
    if (lost > 0) turn += `${time} (${lost} lines are missing here: nobody read them in time)\n`;
    turn += `${time} ${line}\n`;
    lost = 0;
  };
}

// --- The operating system by hand --------------------------------------------------------------
// While something is on its way, keepalive asks nothing, and Linux sends it again for a quarter of
// an hour. So we look ourselves for peers that have not answered for long: struct tcp_info in
// linux/tcp.h, tcp(7). On other systems the kernel decides.
//
// And nothing but the descriptors tells of connections to Bun.serve that have not asked for anything.

const IPPROTO_TCP = 6;
const TCP_INFO = 11;
const TCP_INFO_BYTES = 60; // up to the last field that we read
const STATE_AT = 0; // tcpi_state, a byte
const CLOSE_WAIT = 8; // netinet/tcp.h
const RETRANSMITS_AT = 2; // tcpi_retransmits, a byte: how often the same bytes were sent in vain
const PROBES_AT = 3; // tcpi_probes, a byte: how often the peer was asked in vain
const LAST_ACK_AT = 56; // tcpi_last_ack_recv, 32 bits: ms since the peer has answered

const libc = openLibrary();

function openLibrary() {
  try {
    return dlopen("libc.so.6", {
      getsockopt: { args: ["int", "int", "int", "buffer", "buffer"], returns: "int" },
      getsockname: { args: ["int", "buffer", "buffer"], returns: "int" },
      getpeername: { args: ["int", "buffer", "buffer"], returns: "int" },
      shutdown: { args: ["int", "int"], returns: "int" },
    }).symbols;
  } catch {
    return null; // not Linux with glibc
  }
}

const tcpInfo = new DataView(new ArrayBuffer(TCP_INFO_BYTES));

/** Asks the kernel about a connection. @returns whether the answer is in `tcpInfo` */
function readTcpInfo({ fd = -1 }: Connection): boolean {
  const size = Uint32Array.of(TCP_INFO_BYTES);
  return libc?.getsockopt(fd, IPPROTO_TCP, TCP_INFO, tcpInfo, size) === 0;
}

/** Whether a FIN of the peer has come, read or not. */
function hasEnded(socket: Connection): boolean {
  return readTcpInfo(socket) && tcpInfo.getUint8(STATE_AT) === CLOSE_WAIT;
}

/** Whether a peer is gone without a word, and not only silent or slow. */
function hasVanished(socket: Connection): boolean {
  if (!readTcpInfo(socket)) return false;
  const triesInVain = tcpInfo.getUint8(RETRANSMITS_AT) + tcpInfo.getUint8(PROBES_AT);
  return triesInVain > 5 && tcpInfo.getUint32(LAST_ACK_AT, true) > NO_ANSWER;
}

const SOCKADDR_BYTES = 28; // struct sockaddr_in6, the larger one: ip(7), ipv6(7)
const PORT_AT = 2; // 16 bits in network order
const IPV4_AT = 4;
const IPV6_AT = 8;
const AF_INET = 2;
const SHUT_RDWR = 2; // shutdown(2)

const socketAddress = Buffer.alloc(SOCKADDR_BYTES);

/** Ends all connections to a port of ours but some. `limit` is that of open files. */
function endConnections(port: number, kept: ReadonlySet<string>, limit: number): void {
  if (!libc) return;
  for (let fd = 3; fd < limit; fd++) {
    const isOurs = hasName(libc.getsockname, fd) && socketAddress.readUInt16BE(PORT_AT) === port;
    // The listener has no peer. Bun sees that a connection has ended, and closes it.
    if (isOurs && hasName(libc.getpeername, fd) && !kept.has(readEndpoint()))
      libc.shutdown(fd, SHUT_RDWR);
  }
}

type GetName = (fd: number, address: Buffer, size: Uint32Array) => number;

/** Whether one end of a socket has an address, which is in `socketAddress` then. */
function hasName(getName: GetName, fd: number): boolean {
  return getName(fd, socketAddress, Uint32Array.of(SOCKADDR_BYTES)) === 0;
}

/** What is in `socketAddress`. */
function readEndpoint(): string {
  const isIpv4 = new Uint16Array(socketAddress.buffer, socketAddress.byteOffset, 1)[0] === AF_INET;
  const host = isIpv4
    ? socketAddress.subarray(IPV4_AT, IPV4_AT + 4).join(".")
    : (socketAddress
        .toString("hex", IPV6_AT, IPV6_AT + 16)
        .match(/.{4}/g)
        ?.join(":") ?? "");
  return formatEndpoint(canonicalAddress(host), socketAddress.readUInt16BE(PORT_AT));
}

if (import.meta.main) {
  try {
    main();
  } catch (error) {
    console.error(explain(error));
    process.exit(error instanceof TypeError ? 2 : 1);
  }
}
