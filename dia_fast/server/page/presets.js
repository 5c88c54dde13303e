/** Scripts to begin with. The demo voice speaks some four dozen words, Dia itself all of them. */

export const SOUNDS = ["laughs", "chuckle", "sighs", "gasps", "coughs", "clears throat", "sniffs", "groans", "inhales",
  "exhales", "mumbles", "humming", "singing", "whistles", "sneezes", "claps", "applause", "screams", "burps", "beep"];

export const DEMO = {
  "The red door": "[S1] Please open the red door.\n[S2] Yes, thank you.",
  "Good morning": "[S1] Good morning, the red book is in the kitchen.\n[S2] Thank you, please close the green window.",
  "The number": "[S1] Hello, please call the office.\n[S2] Good evening, the number is seven four two.",
  "The house": "[S1] My house is in the black garden.\n[S2] The yellow car is in the garden, thank you.",
};

export const DIA = {
  "What dia-fast is": "[S1] Dia is an open weights text to dialogue model.\n[S2] You get full control over scripts and voices.\n[S1] Wow. Amazing. (laughs)\n[S2] Try it now on your own machine.",
  "A late train": "[S1] Excuse me, is this the train to the coast?\n[S2] (sighs) It was. It left about a minute ago.\n[S1] You are joking. (laughs) Please tell me you are joking.\n[S2] I wish I were. The next one goes at six in the morning.",
  "In the kitchen": "[S1] Do you smell that?\n[S2] (sniffs) Smell what?\n[S1] I think the bread is burning!\n[S2] (gasps) The bread! I forgot all about the bread.",
  "One speaker": "[S1] Good evening, and welcome. Tonight we talk about the sea, and about the people who have lived beside it for a thousand years.",
};
