/** What was spoken, in the IndexedDB of this browser. */
const KEPT = 40;

let opened;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("dia-fast", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("spoken", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("spoken", mode);
    const request = work(transaction.objectStore("spoken"));
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** All entries, the newest first. */
export async function entries() {
  return (await run("readonly", (store) => store.getAll())).reverse();
}

export async function add(entry) {
  await run("readwrite", (store) => store.add(entry));
  for (const old of (await entries()).slice(KEPT)) await remove(old.id);
}

export function remove(id) { return run("readwrite", (store) => store.delete(id)); }

export function clear() { return run("readwrite", (store) => store.clear()); }
